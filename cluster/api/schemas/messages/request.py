"""Body of /v1/messages and /v1/messages/count_tokens: messages of content blocks, tools, and how to answer.

Knows Anthropic's names, types and bounds, and a few of vLLM's names for what Anthropic does not have.
"""

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from cluster.api.schemas.base import MAX_STOP_STRINGS, Fraction, Int64, Priority, StopString, UserName
from cluster.api.schemas.chat import MAX_MESSAGES, MAX_TOOLS, FunctionName

BlockId = Annotated[str, Meta(min_length=1, max_length=128)]


class TextBlockInput(Struct, frozen=True, kw_only=True, tag_field="type", tag="text"):
    text: str


class ImageBlockInput(Struct, frozen=True, kw_only=True, tag_field="type", tag="image"):
    """Refused by name: the model reads text only."""


class DocumentBlockInput(Struct, frozen=True, kw_only=True, tag_field="type", tag="document"):
    """Refused by name: the model reads text only."""


class ToolUseBlockInput(Struct, frozen=True, kw_only=True, tag_field="type", tag="tool_use"):
    """A call that the model made. `input`: its arguments."""

    id: BlockId
    name: FunctionName
    input: dict[str, Any]


class ToolResultBlockInput(Struct, frozen=True, kw_only=True, tag_field="type", tag="tool_result"):
    """The result of the call with the id `tool_use_id`."""

    tool_use_id: BlockId
    content: str | list[TextBlockInput | ImageBlockInput | DocumentBlockInput] | None = None


class ThinkingBlockInput(Struct, frozen=True, kw_only=True, tag_field="type", tag="thinking"):
    """The thoughts of a reasoning model, which are not part of the conversation here."""

    thinking: str | None = None
    signature: str | None = None


class RedactedThinkingBlockInput(Struct, frozen=True, kw_only=True, tag_field="type", tag="redacted_thinking"):
    data: str | None = None


Block = (
    TextBlockInput
    | ImageBlockInput
    | DocumentBlockInput
    | ToolUseBlockInput
    | ToolResultBlockInput
    | ThinkingBlockInput
    | RedactedThinkingBlockInput
)


class MessageInput(Struct, frozen=True, kw_only=True):
    """The response continues a last message of the assistant."""

    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class MessageTool(Struct, frozen=True, kw_only=True):
    """A function; `input_schema` is a JSON schema. `strict`: refuse a schema that cannot be enforced completely."""

    name: FunctionName
    input_schema: dict[str, Any]
    description: str | None = None
    type: Literal["custom"] | None = None
    strict: bool | None = None


class MessageToolChoice(Struct, frozen=True, kw_only=True):
    """`any`: call at least one tool. `tool`: call the one with this `name`."""

    type: Literal["auto", "any", "tool", "none"]
    name: FunctionName | None = None
    disable_parallel_tool_use: bool | None = None


class MessageMetadata(Struct, frozen=True, kw_only=True):
    """`user_id` is written to the log."""

    user_id: UserName | None = None


class Thinking(Struct, frozen=True, kw_only=True):
    """A setting of reasoning models. The model does not reason, so that "disabled" is what happens."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = None
    display: str | None = None


class JsonOutput(Struct, frozen=True, kw_only=True):
    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(Struct, frozen=True, kw_only=True):
    """`format`: JSON that follows a schema."""

    format: JsonOutput | None = None
    effort: Annotated[str, Meta(max_length=16)] | None = None


class MessagePrompt(Struct, frozen=True, kw_only=True):
    """What decides the prompt. `thread`: Anthropic's conversations that its server keeps. Refused, so that its client sends them whole."""

    model: str
    messages: Annotated[list[MessageInput], Meta(min_length=1, max_length=MAX_MESSAGES)]
    system: str | list[TextBlockInput] | None = None
    tools: Annotated[list[MessageTool], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: MessageToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    thread: dict[str, Any] | None = None


class MessageRequest(MessagePrompt, frozen=True, kw_only=True):
    """`max_tokens`: more than fits means all that fits. From `seed` on, additions with vLLM's names, as in chat."""

    max_tokens: Annotated[int, Meta(ge=1)]
    stream: bool | None = None
    stop_sequences: Annotated[list[StopString], Meta(max_length=MAX_STOP_STRINGS)] | None = None
    temperature: Annotated[float, Meta(ge=0.0, le=2.0)] | None = None
    top_p: Fraction | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    metadata: MessageMetadata | None = None
    seed: Int64 | None = None
    min_p: Fraction | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100.0)] | None = None
    ignore_eos: bool | None = None
    priority: Priority | None = None
