"""Formats the responses of /v1/completions: whole, or as chunks of a stream, which have the same form.

Knows the response structs; knows neither prompts nor HTTP.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import msgspec
from msgspec import UNSET, UnsetType

from cluster.api.context import ApiContext
from cluster.api.generation.generation import Choice, Event, Whole, usage
from cluster.api.generation.logprobs import EchoedPrompt, echo_prompt, render_completion, render_prompt
from cluster.api.schemas.base import PromptLogprobs
from cluster.api.schemas.completions import Completion, CompletionChoice, CompletionLogprobs, CompletionRequest
from cluster.api.server.sse import TextEvents
from cluster.text.output.output_text import PlacedLogprob


@dataclass
class CompletionFormatter:
    """A Formatter (generation/answering.py) for one request."""

    api: ApiContext
    body: CompletionRequest
    head: Completion
    choices: Sequence[Choice]
    _echoes: dict[int, EchoedPrompt] = field(default_factory=dict)  # by choice
    _texts: dict[int, TextEvents] = field(default_factory=dict)  # by choice

    def whole(self, wholes: Sequence[Whole]) -> Completion:
        kept = self._best(wholes)
        finished = []
        for index, whole in enumerate(kept):
            echoed = self._echoed(whole.choice)
            finished.append(
                CompletionChoice(
                    index=index,
                    text=(echoed.text if echoed else "") + whole.text,
                    logprobs=self._logprobs(
                        whole.choice, whole.logprobs, echoed, start=len(echoed.text) if echoed else 0
                    ),
                    finish_reason=whole.choice.output.finish_reason,
                    prompt_logprobs=self._prompt_logprobs(whole.choice),
                    prompt_token_ids=self._if_ids(whole.choice.request.prompt_token_ids),
                    token_ids=self._if_ids(whole.token_ids),
                )
            )
        return msgspec.structs.replace(self.head, choices=finished, usage=usage(self.choices))

    def chunks(self, event: Event) -> Iterable[Completion | bytes]:
        step, body = event.step, self.body
        if event.is_first or not step.is_text or body.logprobs is not None or body.return_token_ids:
            return self._chunks(event)
        index = event.choice.index
        if index not in self._texts:
            self._texts[index] = TextEvents(
                lambda text, usage: msgspec.structs.replace(
                    self.head, choices=[CompletionChoice(index=index, text=text)], usage=usage
                ),
                (lambda: usage(self.choices)) if body.continuous_usage else None,
            )
        return (self._texts[index].encode(step.text),)

    def _chunks(self, event: Event) -> Iterator[Completion]:
        choice, step = event.choice, event.step
        echoed = self._echoed(choice)
        start = len(echoed.text) if echoed else 0
        first_echo = echoed if event.is_first else None
        has_content = step.text or step.logprobs or step.finish_reason is not None or first_echo is not None
        if not has_content and not (self.body.return_token_ids and event.token_ids):
            return
        part = CompletionChoice(
            index=choice.index,
            text=(first_echo.text if first_echo else "") + step.text,
            logprobs=self._logprobs(choice, step.logprobs, first_echo, start=start),
            finish_reason=step.finish_reason,
            prompt_logprobs=self._prompt_logprobs(choice) if event.is_first else UNSET,
            prompt_token_ids=self._if_ids(choice.request.prompt_token_ids) if event.is_first else UNSET,
            token_ids=self._if_ids(event.token_ids),
        )
        so_far = usage(self.choices) if self.body.continuous_usage else None
        yield msgspec.structs.replace(self.head, choices=[part], usage=so_far)

    def last_chunks(self) -> Iterator[Completion]:
        if self.body.include_usage:
            yield msgspec.structs.replace(self.head, usage=usage(self.choices))

    def _best(self, wholes: Sequence[Whole]) -> list[Whole]:
        """The n likeliest of each prompt's `best_of` sequences, by log-probability per token; without `best_of` all, in their order."""
        n, num_copies = self.body.n or 1, self.body.num_copies
        if num_copies == n:
            return list(wholes)
        kept: list[Whole] = []
        for i in range(0, len(wholes), num_copies):
            kept += sorted(wholes[i : i + num_copies], key=lambda w: -w.choice.mean_logprob)[:n]
        return kept

    def _echoed(self, choice: Choice) -> EchoedPrompt | None:
        if not self.body.echo:
            return None
        if choice.index not in self._echoes:
            self._echoes[choice.index] = echo_prompt(
                self.api.tokenizer,
                choice.request.prompt_token_ids,
                shows_special=self.body.shows_special_tokens,
            )
        return self._echoes[choice.index]

    def _logprobs(
        self, choice: Choice, placed: Sequence[PlacedLogprob], echoed: EchoedPrompt | None, *, start: int
    ) -> CompletionLogprobs | None:
        if self.body.logprobs is None:
            return None
        return render_completion(
            self.api.tokenizer,
            placed,
            num_top=self.body.logprobs,
            echoed=echoed,
            echoed_logprobs=choice.prompt_logprobs,
            start=start,
        )

    def _prompt_logprobs(self, choice: Choice) -> PromptLogprobs | UnsetType:
        if self.body.prompt_logprobs is None:
            return UNSET
        return render_prompt(self.api.tokenizer, choice.prompt_logprobs, num_top=self.body.prompt_logprobs)

    def _if_ids(self, token_ids: list[int]) -> list[int] | UnsetType:
        return token_ids if self.body.return_token_ids else UNSET
