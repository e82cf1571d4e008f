"""Body of /v1/chat/completions with its messages and tools, and the response, whole and in chunks."""

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from cluster.api.schemas.base import GenerationRequest, NumLogprobs, PromptLogprobs, Usage

MAX_TOOLS = 128
MAX_MESSAGES = 16_384

FunctionName = Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


class TextPart(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    text: str
    # A field, not a tag: msgspec requires a tag only in a union.
    type: Literal["text"]


Content = str | list[TextPart]
NoItems = Annotated[list[Any], Meta(max_length=0)]


class FunctionCall(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`arguments` is JSON as text, as in OpenAI's API."""

    name: FunctionName
    arguments: str


class ToolCall(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    id: Annotated[str, Meta(min_length=1, max_length=128)]
    function: FunctionCall
    type: Literal["function"] = "function"
    # Ignored: some clients send it back with a streamed call.
    index: int | None = None


class SystemMessage(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="role", tag="system"):
    content: Content


class DeveloperMessage(
    Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="role", tag="developer"
):
    content: Content


class UserMessage(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="role", tag="user"):
    content: Content


class AssistantMessage(
    Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="role", tag="assistant"
):
    """`prefix` on the last message: the response continues it. The null fields allow clients to send a response back unchanged."""

    content: Content | None = None
    tool_calls: list[ToolCall] | None = None
    prefix: bool | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: NoItems | None = None


class ToolMessage(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="role", tag="tool"):
    """The result of a tool call. `name` may repeat the function's name."""

    content: Content
    tool_call_id: Annotated[str, Meta(min_length=1, max_length=128)]
    name: str | None = None


ChatMessage = SystemMessage | DeveloperMessage | UserMessage | AssistantMessage | ToolMessage


class FunctionDefinition(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`parameters` is a JSON schema. `strict`: refuse a schema that cannot be enforced completely, instead of loosening it."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    function: FunctionDefinition
    type: Literal["function"] = "function"


class FunctionChoice(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: FunctionName


class NamedToolChoice(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    function: FunctionChoice
    type: Literal["function"] = "function"


class ChatRequest(GenerationRequest, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`max_completion_tokens` is the newer name of `max_tokens`. `safe_prompt` puts Mistral's safety prompt before the conversation."""

    messages: Annotated[list[ChatMessage], Meta(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Meta(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: NumLogprobs | None = None
    tools: Annotated[list[Tool], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    safe_prompt: bool | None = None


class TopLogprob(Struct, frozen=True, kw_only=True):
    token: str
    logprob: float
    bytes: list[int] | None


class ChatTokenLogprob(Struct, frozen=True, kw_only=True):
    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct, frozen=True, kw_only=True):
    content: list[ChatTokenLogprob]
    refusal: None = None


class ResponseFunction(Struct, frozen=True, kw_only=True):
    name: str
    arguments: str


class ResponseToolCall(Struct, frozen=True, kw_only=True):
    id: str
    function: ResponseFunction
    type: str = "function"


class ChatResponseMessage(Struct, frozen=True, kw_only=True):
    """`content` is null if there are only tool calls."""

    content: str | None
    role: str = "assistant"
    refusal: None = None
    tool_calls: list[ResponseToolCall] | UnsetType = UNSET


class ChatChoice(Struct, frozen=True, kw_only=True):
    index: int
    message: ChatResponseMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletion(Struct, frozen=True, kw_only=True):
    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    object: str = "chat.completion"
    usage: Usage | None = None
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class FunctionDelta(Struct, frozen=True, kw_only=True, omit_defaults=True):
    name: str | None = None
    arguments: str | None = None


class ToolCallDelta(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The first delta of a call has `id`, `type` and the name; the others have pieces of the arguments."""

    index: int
    function: FunctionDelta
    id: str | None = None
    type: str | None = None


class ChatDelta(Struct, frozen=True, kw_only=True, omit_defaults=True):
    role: str | None = None
    content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChunkChoice(Struct, frozen=True, kw_only=True):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    token_ids: list[int] | UnsetType = UNSET


class ChatChunk(Struct, frozen=True, kw_only=True):
    id: str
    created: int
    model: str
    choices: list[ChatChunkChoice]
    object: str = "chat.completion.chunk"
    usage: Usage | None = None
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
