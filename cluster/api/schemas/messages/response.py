"""A message of the model, whole and as events, and the count of a prompt's tokens, in Anthropic's form. Knows the form only."""

from typing import Any, Literal

from msgspec import Struct

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"]


class TextBlock(Struct, frozen=True, kw_only=True, tag_field="type", tag="text"):
    text: str


class ToolUseBlock(Struct, frozen=True, kw_only=True, tag_field="type", tag="tool_use"):
    """`input`: the arguments; empty if they were cut off."""

    id: str
    name: str
    input: dict[str, Any]


class MessageUsage(Struct, frozen=True, kw_only=True):
    """`input_tokens`: those that were not in the prefix cache; `cache_read_input_tokens`: those that were."""

    input_tokens: int
    output_tokens: int
    cache_read_input_tokens: int
    cache_creation_input_tokens: int = 0


class Message(Struct, frozen=True, kw_only=True, tag_field="type", tag="message"):
    """`stop_reason`: null while it is streamed. `stop_sequence`: the one that was found."""

    id: str
    model: str
    content: list[TextBlock | ToolUseBlock]
    usage: MessageUsage
    stop_reason: StopReason | None = None
    stop_sequence: str | None = None
    role: Literal["assistant"] = "assistant"


class TokenCount(Struct, frozen=True, kw_only=True):
    input_tokens: int


class MessageStart(Struct, frozen=True, kw_only=True, tag_field="type", tag="message_start"):
    message: Message


class BlockStart(Struct, frozen=True, kw_only=True, tag_field="type", tag="content_block_start"):
    index: int
    content_block: TextBlock | ToolUseBlock


class BlockText(Struct, frozen=True, kw_only=True, tag_field="type", tag="text_delta"):
    text: str


class BlockJson(Struct, frozen=True, kw_only=True, tag_field="type", tag="input_json_delta"):
    """A piece of the arguments' JSON text."""

    partial_json: str


class BlockDelta(Struct, frozen=True, kw_only=True, tag_field="type", tag="content_block_delta"):
    index: int
    delta: BlockText | BlockJson


class BlockStop(Struct, frozen=True, kw_only=True, tag_field="type", tag="content_block_stop"):
    index: int


class MessageEnd(Struct, frozen=True, kw_only=True):
    stop_reason: StopReason
    stop_sequence: str | None


class MessageDelta(Struct, frozen=True, kw_only=True, tag_field="type", tag="message_delta"):
    delta: MessageEnd
    usage: MessageUsage


class MessageStop(Struct, frozen=True, kw_only=True, tag_field="type", tag="message_stop"):
    """The last event."""


MessageEvent = MessageStart | BlockStart | BlockDelta | BlockStop | MessageDelta | MessageStop
