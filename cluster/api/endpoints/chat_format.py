"""Formats the responses of /v1/chat/completions: whole, or as chunks of a stream.

Knows the response structs and how tool calls arrive in pieces; knows neither prompts nor HTTP.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import msgspec
from msgspec import UNSET, UnsetType

from cluster.api.context import ApiContext
from cluster.api.generation.generation import Choice, Event, Whole, usage
from cluster.api.generation.logprobs import render_chat, render_prompt
from cluster.api.schemas.base import PromptLogprobs
from cluster.api.schemas.chat import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatRequest,
    ChatResponseMessage,
    FunctionDelta,
    ResponseFunction,
    ResponseToolCall,
    ToolCallDelta,
)
from cluster.api.schemas.completions import CompletionRequest
from cluster.api.server.sse import TextEvents
from cluster.text.output.output_text import OutputStep, PlacedLogprob
from cluster.text.tools.calls import ToolCallDelta as CallPiece
from workers.protocol import FinishReason


@dataclass
class ChatFormatter:
    """A Formatter (generation/answering.py) for one request."""

    api: ApiContext
    body: ChatRequest | CompletionRequest
    head: ChatCompletion
    choices: Sequence[Choice]
    _opened: set[int] = field(default_factory=set)
    _texts: dict[int, TextEvents] = field(default_factory=dict)  # by choice

    def whole(self, wholes: Sequence[Whole]) -> ChatCompletion:
        finished = []
        for whole in wholes:
            calls = _join_calls(whole.steps)
            thoughts = "".join(step.thoughts for step in whole.steps)
            message = ChatResponseMessage(
                content=None if (calls or thoughts) and not whole.text else whole.text,
                tool_calls=calls or UNSET,
                reasoning_content=thoughts or UNSET,
            )
            finished.append(
                ChatChoice(
                    index=whole.choice.index,
                    message=message,
                    logprobs=self._logprobs(whole.logprobs),
                    finish_reason=_finish_reason(whole.choice, whole.choice.output.finish_reason),
                    token_ids=whole.token_ids if self.body.return_token_ids else UNSET,
                )
            )
        return msgspec.structs.replace(
            self.head,
            choices=finished,
            usage=usage(self.choices),
            prompt_logprobs=self._prompt_logprobs(),
            prompt_token_ids=self._prompt_token_ids(),
        )

    def chunks(self, event: Event) -> Iterable[ChatChunk | bytes]:
        step, body, index = event.step, self.body, event.choice.index
        is_open = index in self._opened
        if not is_open or not step.is_text or body.logprobs or body.return_token_ids:
            return self._chunks(event)
        if index not in self._texts:
            self._texts[index] = TextEvents(
                lambda text, usage: msgspec.structs.replace(
                    self._chunk(ChatChunkChoice(index=index, delta=ChatDelta(content=text))), usage=usage
                ),
                (lambda: usage(self.choices)) if body.continuous_usage else None,
            )
        return (self._texts[index].encode(step.text),)

    def _chunks(self, event: Event) -> Iterator[ChatChunk]:
        choice, step = event.choice, event.step
        index = choice.index
        token_ids = event.token_ids if self.body.return_token_ids else UNSET
        if index not in self._opened:
            first = not self._opened
            self._opened.add(index)
            yield self._chunk(
                ChatChunkChoice(index=index, delta=ChatDelta(role="assistant", content="")),
                prompt_logprobs=self._prompt_logprobs() if first else UNSET,
                prompt_token_ids=self._prompt_token_ids() if first else UNSET,
            )
        if step.thoughts:
            thought = ChatChunkChoice(
                index=index, delta=ChatDelta(reasoning_content=step.thoughts), token_ids=token_ids
            )
            yield self._chunk(thought)
            token_ids = [] if self.body.return_token_ids else UNSET
        if step.text or step.logprobs or (token_ids and not step.tool_calls):
            part = ChatChunkChoice(
                index=index,
                delta=ChatDelta(content=step.text),
                logprobs=self._logprobs(step.logprobs),
                token_ids=token_ids,
            )
            yield self._chunk(part)
            token_ids = [] if self.body.return_token_ids else UNSET
        if step.tool_calls:
            delta = ChatDelta(tool_calls=[_call_delta(call) for call in step.tool_calls])
            yield self._chunk(ChatChunkChoice(index=index, delta=delta, token_ids=token_ids))
        if step.finish_reason is not None:
            reason = _finish_reason(choice, step.finish_reason)
            yield self._chunk(ChatChunkChoice(index=index, delta=ChatDelta(), finish_reason=reason))

    def last_chunks(self) -> Iterator[ChatChunk]:
        if self.body.include_usage:
            yield ChatChunk(
                id=self.head.id,
                created=self.head.created,
                model=self.head.model,
                choices=[],
                usage=usage(self.choices),
            )

    def _chunk(
        self,
        part: ChatChunkChoice,
        *,
        prompt_logprobs: PromptLogprobs | UnsetType = UNSET,
        prompt_token_ids: list[int] | UnsetType = UNSET,
    ) -> ChatChunk:
        return ChatChunk(
            id=self.head.id,
            created=self.head.created,
            model=self.head.model,
            choices=[part],
            usage=usage(self.choices) if self.body.continuous_usage else None,
            prompt_logprobs=prompt_logprobs,
            prompt_token_ids=prompt_token_ids,
        )

    def _logprobs(self, placed: Sequence[PlacedLogprob]) -> ChatLogprobs | None:
        if not self.body.logprobs:
            return None
        return render_chat(self.api.tokenizer, placed, shows_special=self.body.shows_special_tokens)

    def _prompt_logprobs(self) -> PromptLogprobs | UnsetType:
        if self.body.prompt_logprobs is None:
            return UNSET
        entries = next((c.prompt_logprobs for c in self.choices if c.prompt_logprobs), [])
        return render_prompt(self.api.tokenizer, entries, num_top=self.body.prompt_logprobs)

    def _prompt_token_ids(self) -> list[int] | UnsetType:
        return self.choices[0].request.prompt_token_ids if self.body.return_token_ids else UNSET


def _finish_reason(choice: Choice, reason: FinishReason | None) -> str | None:
    return "tool_calls" if reason is FinishReason.STOP and choice.output.called_tools else reason


def _join_calls(steps: Sequence[OutputStep]) -> list[ResponseToolCall]:
    """The tool calls whose pieces are in the steps."""
    ids: dict[int, str] = {}
    names: dict[int, str] = {}
    arguments: dict[int, list[str]] = {}
    for call in (call for step in steps for call in step.tool_calls):
        if call.id is not None:
            ids[call.index] = call.id
        if call.name is not None:
            names[call.index] = call.name
        arguments.setdefault(call.index, []).append(call.arguments)
    return [
        ResponseToolCall(id=ids[i], function=ResponseFunction(name=names[i], arguments="".join(arguments[i])))
        for i in sorted(ids)
    ]


def _call_delta(piece: CallPiece) -> ToolCallDelta:
    opens = piece.id is not None
    return ToolCallDelta(
        index=piece.index,
        id=piece.id,
        type="function" if opens else None,
        function=FunctionDelta(name=piece.name, arguments=piece.arguments),
    )
