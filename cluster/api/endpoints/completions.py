"""POST /v1/completions: a prompt as text or token ids, continued, echoed, or filled in before a suffix.

Knows the endpoint's prompt forms and answer shape. The text of an answer goes on where the prompt's ended: a first token `▁world`
behind "Hello" is " world".
"""

import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import msgspec
from aiohttp import web
from msgspec import UNSET, UnsetType

from cluster.api.context import GATEWAY, Gateway
from cluster.api.generation import sampling
from cluster.api.generation.answering import Prepared, answer, check_shape
from cluster.api.generation.generation import Choice, Event, Whole, make_choice, usage
from cluster.api.generation.logprobs import EchoedPrompt, echo_prompt, render_completion, render_prompt
from cluster.api.generation.origin import HTTP, Origin
from cluster.api.generation.prompts import encode_prompt, in_thread_if_long, refuse_hopeless, split_prompt, truncate
from cluster.api.generation.structured import check_combination, structured_output
from cluster.api.schemas.base import PromptLogprobs
from cluster.api.schemas.completions import Completion, CompletionChoice, CompletionLogprobs, CompletionRequest
from cluster.api.server import request_options
from cluster.api.server.body import read_body
from cluster.system.log import log_prompt
from cluster.text.infilling import encode_infilling
from cluster.text.output.output import PlacedLogprob
from workers.errors import RequestError
from workers.protocol import EngineFacts


async def handle(request: web.Request) -> web.StreamResponse:
    """One answer, or a stream of chunks."""
    gateway = request.app[GATEWAY]
    arrived = time.monotonic()
    deadline = request_options.deadline(request, arrived=arrived)
    body = await read_body(request, CompletionRequest)
    check(gateway, body)
    log_prompt(body.prompt)
    prepared = await prepare(gateway, body)
    return await answer(request, gateway, prepared, deadline=deadline, arrived=arrived)


def check(gateway: Gateway, body: CompletionRequest) -> None:
    """As far as that needs no replica. Raises RequestError."""
    gateway.check_model(body.model)
    prompts = split_prompt(body.prompt)
    _check_fields(body, prompts)
    check_shape(gateway, body, num_prompts=len(prompts), num_copies=_num_copies(body))


async def prepare(gateway: Gateway, body: CompletionRequest, origin: Origin = HTTP) -> Prepared:
    """Raises RequestError for what the model cannot do, ReplicaUnavailableError while no replica has told what it can."""
    head = Completion(id=f"cmpl-{uuid.uuid4().hex}", created=int(time.time()), model=body.model, choices=[])
    choices = await _choices(gateway, body, origin, facts=gateway.router.facts, answer_id=head.id)
    return Prepared(body=body, choices=choices, wording=_Wording(gateway, body, head, choices))


def _num_copies(body: CompletionRequest) -> int:
    return body.best_of or body.n or 1


def _check_fields(body: CompletionRequest, prompts: Sequence[str | list[int]]) -> None:
    """Raises RequestError for what makes no sense together."""
    n = body.n or 1
    if body.best_of is not None and body.best_of < n:
        raise RequestError(f"'best_of' is {body.best_of}; it must be at least n, which is {n}.", param="best_of")
    if body.best_of is not None and body.best_of > n and body.stream:
        raise RequestError(
            "'best_of' beyond n cannot be streamed: which ones are best is known at the end.", param="best_of"
        )
    if body.max_tokens == 0 and not body.echo and body.prompt_logprobs is None:
        raise RequestError(
            "'max_tokens' is 0, so there would be no answer; send at least 1, or ask for 'echo' or 'prompt_logprobs'.",
            param="max_tokens",
        )
    if body.suffix:
        if body.echo:
            raise RequestError("'echo' cannot be combined with 'suffix'; leave one of them out.", param="echo")
        if not all(isinstance(p, str) for p in prompts):
            raise RequestError("'suffix' needs a prompt that is text.", param="suffix")


async def _choices(
    gateway: Gateway,
    body: CompletionRequest,
    origin: Origin,
    *,
    facts: EngineFacts,
    answer_id: str,
) -> list[Choice]:
    num_copies = _num_copies(body)
    choices: list[Choice] = []
    wanted = structured_output(body)
    if wanted is not None:
        check_combination(body, wanted[1])
    counts = [count for count in (body.logprobs if body.echo else None, body.prompt_logprobs) if count is not None]
    ranks = num_copies > (body.n or 1)
    grammars: dict[bool, str] = {}  # by whether the text opens behind nothing
    for prompt in split_prompt(body.prompt):
        token_ids = await _encode(gateway, body, prompt, facts=facts)
        grammar = None
        if wanted is not None:
            at_start = _opens(gateway, token_ids)
            if at_start not in grammars:
                grammars[at_start] = await gateway.grammars.compile(
                    wanted[0], at_start=at_start, param=wanted[1], facts=facts
                )
            grammar = grammars[at_start]
        max_tokens = sampling.resolve_max_tokens(
            body.max_tokens,
            default=max(sampling.DEFAULT_COMPLETION_TOKENS, body.min_tokens or 0),
            num_prompt_tokens=len(token_ids),
            facts=facts,
            prompt_param="prompt",
        )
        # With the client's seed a prompt's text does not depend on its neighbours; without one, equal prompts differ.
        seed = origin.seed_of(body.seed)
        for copy in range(num_copies):
            params = sampling.sampling_params(
                body,
                max_tokens=max_tokens,
                seed=sampling.derive_seed(seed, copy),
                logprobs=0 if ranks and body.logprobs is None else body.logprobs,
                prompt_logprobs=max(counts, default=None),
                grammar=grammar,
                tokenizer=gateway.tokenizer,
                facts=facts,
            )
            choices.append(
                make_choice(
                    gateway,
                    body,
                    origin=origin,
                    answer_id=answer_id,
                    index=len(choices),
                    copy=copy,
                    prompt_token_ids=token_ids,
                    continues=token_ids,
                    sampling=params,
                    shows_end=True,  # whoever scores a continuation by echo counts on one entry for each token
                )
            )
    return choices


async def _encode(
    gateway: Gateway, body: CompletionRequest, prompt: str | list[int], *, facts: EngineFacts
) -> list[int]:
    tokenizer, keep = gateway.tokenizer, body.truncate_prompt_tokens
    if body.suffix and isinstance(prompt, str):
        if keep is not None:
            raise RequestError(
                "'truncate_prompt_tokens' cannot be combined with 'suffix'; shorten one of the texts.",
                param="truncate_prompt_tokens",
            )
        suffix, num_chars = body.suffix, len(prompt) + len(body.suffix)
        refuse_hopeless(num_chars, tokenizer, param="prompt", facts=facts)
        return await in_thread_if_long(num_chars, lambda: encode_infilling(tokenizer, prompt, suffix))
    token_ids = await encode_prompt(tokenizer, prompt, facts=facts, truncates=keep is not None)
    return truncate(token_ids, keep, facts=facts, num_output=body.max_tokens)


def _opens(gateway: Gateway, token_ids: list[int]) -> bool:
    """Whether the output's text has none before it, so that its first token loses a leading space."""
    control = gateway.tokenizer.control_token_ids
    return all(token_id in control for token_id in token_ids)


@dataclass
class _Wording:
    gateway: Gateway
    body: CompletionRequest
    head: Completion
    choices: Sequence[Choice]
    _echoes: dict[int, EchoedPrompt] = field(default_factory=dict)  # by choice

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

    def chunks(self, event: Event) -> Iterator[Completion]:
        choice, step = event.choice, event.step
        echoed = self._echoed(choice)
        start = len(echoed.text) if echoed else 0
        first_echo = echoed if event.is_first else None
        says = step.text or step.logprobs or step.finish_reason is not None or first_echo is not None
        if not says and not (self.body.return_token_ids and event.token_ids):
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
        """The n likeliest of each prompt's best_of, by log-probability per token; all of them in their order if they are as many."""
        n, num_copies = self.body.n or 1, _num_copies(self.body)
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
            self._echoes[choice.index] = echo_prompt(self.gateway.tokenizer, choice.request.prompt_token_ids)
        return self._echoes[choice.index]

    def _logprobs(
        self, choice: Choice, placed: Sequence[PlacedLogprob], echoed: EchoedPrompt | None, *, start: int
    ) -> CompletionLogprobs | None:
        if self.body.logprobs is None:
            return None
        return render_completion(
            self.gateway.tokenizer,
            placed,
            num_top=self.body.logprobs,
            echoed=echoed,
            echoed_logprobs=choice.prompt_logprobs,
            start=start,
        )

    def _prompt_logprobs(self, choice: Choice) -> PromptLogprobs | UnsetType:
        if self.body.prompt_logprobs is None:
            return UNSET
        return render_prompt(self.gateway.tokenizer, choice.prompt_logprobs, num_top=self.body.prompt_logprobs)

    def _if_ids(self, token_ids: list[int]) -> list[int] | UnsetType:
        return token_ids if self.body.return_token_ids else UNSET
