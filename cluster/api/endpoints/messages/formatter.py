"""Formats the answers of /v1/messages: whole, or as events. Knows Anthropic's forms and how tool calls arrive in pieces; no prompts.

Text and each call are blocks of their own, in the order in which the model writes them.
"""

import json
from collections.abc import Iterator, Sequence

import msgspec

from cluster.api.generation.generation import Choice, Event, Whole
from cluster.api.schemas.messages.response import (
    BlockDelta,
    BlockJson,
    BlockStart,
    BlockStop,
    BlockText,
    Message,
    MessageDelta,
    MessageEnd,
    MessageEvent,
    MessageStart,
    MessageStop,
    MessageUsage,
    StopReason,
    TextBlock,
    ToolUseBlock,
)
from cluster.text.output.output_text import OutputStep
from workers.protocol import FinishReason


class MessageFormatter:
    """A Formatter (generation/answering.py) for one request. at_limit: the reason of an output that reached its limit of tokens."""

    def __init__(self, choice: Choice, *, message_id: str, model: str, at_limit: StopReason = "max_tokens") -> None:
        self._choice = choice
        self._id = message_id
        self._model = model
        self._at_limit: StopReason = at_limit
        self._index = -1  # of the newest block
        self._open: type[TextBlock] | type[ToolUseBlock] | None = None
        self._has_started = False

    def whole(self, wholes: Sequence[Whole]) -> Message:
        [whole] = wholes
        blocks: list[TextBlock | ToolUseBlock] = []
        pieces: list[str] = []
        for step in whole.steps:
            for event in self._blocks(step):
                if isinstance(event, BlockStart):
                    blocks.append(event.content_block)
                    pieces.append("")
                elif isinstance(event, BlockDelta):
                    delta = event.delta
                    pieces[-1] += delta.text if isinstance(delta, BlockText) else delta.partial_json
        return msgspec.structs.replace(
            self._head(),
            content=[_filled(block, text) for block, text in zip(blocks, pieces, strict=True)],
            stop_reason=self._end().stop_reason,
            stop_sequence=self._end().stop_sequence,
        )

    def chunks(self, event: Event) -> Iterator[MessageEvent]:
        if not self._has_started:
            self._has_started = True
            head = self._head()
            yield MessageStart(
                message=msgspec.structs.replace(head, usage=msgspec.structs.replace(head.usage, output_tokens=0))
            )
        yield from self._blocks(event.step)
        if event.step.finish_reason is not None:
            yield from self._close()
            yield MessageDelta(delta=self._end(), usage=self._usage())
            yield MessageStop()

    def last_chunks(self) -> Sequence[msgspec.Struct]:
        return ()

    def _blocks(self, step: OutputStep) -> Iterator[BlockStart | BlockDelta | BlockStop]:
        if step.text:
            if self._open is not TextBlock:
                yield from self._close()
                yield self._start(TextBlock(text=""))
            yield BlockDelta(index=self._index, delta=BlockText(text=step.text))
        for piece in step.tool_calls:
            if piece.id is not None:
                yield from self._close()
                yield self._start(ToolUseBlock(id=piece.id, name=piece.name or "", input={}))
            if piece.arguments and self._open is ToolUseBlock:
                yield BlockDelta(index=self._index, delta=BlockJson(partial_json=piece.arguments))

    def _start(self, block: TextBlock | ToolUseBlock) -> BlockStart:
        self._index += 1
        self._open = type(block)
        return BlockStart(index=self._index, content_block=block)

    def _close(self) -> Iterator[BlockStop]:
        if self._open is not None:
            self._open = None
            yield BlockStop(index=self._index)

    def _head(self) -> Message:
        return Message(id=self._id, model=self._model, content=[], usage=self._usage())

    def _usage(self) -> MessageUsage:
        cached = self._choice.num_cached_tokens or 0
        return MessageUsage(
            input_tokens=len(self._choice.request.prompt_token_ids) - cached,
            output_tokens=self._choice.output.num_tokens,
            cache_read_input_tokens=cached,
        )

    def _end(self) -> MessageEnd:
        output = self._choice.output
        reason: StopReason = "end_turn"
        if output.finish_reason is FinishReason.LENGTH:
            reason = self._at_limit
        elif output.called_tools:
            reason = "tool_use"
        elif output.stop_string is not None:
            reason = "stop_sequence"
        return MessageEnd(stop_reason=reason, stop_sequence=output.stop_string)


def _filled(block: TextBlock | ToolUseBlock, text: str) -> TextBlock | ToolUseBlock:
    if isinstance(block, TextBlock):
        return TextBlock(text=text)
    try:
        arguments = json.loads(text or "{}")
    except (ValueError, RecursionError):  # cut off
        arguments = {}
    return msgspec.structs.replace(block, input=arguments if isinstance(arguments, dict) else {})
