"""Body of /v1/chat/completions with its messages and tools, and the response, whole and in chunks."""

import json
from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from cluster.api.schemas.base import GenerationRequest, NumLogprobs, PromptLogprobs, Usage

MAX_TOOLS = 128
MAX_MESSAGES = 16_384
MAX_TEMPLATE_KWARGS = 64

TemplateKwargs = Annotated[dict[str, Any], Meta(max_length=MAX_TEMPLATE_KWARGS)]
FunctionName = Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


class TextPart(Struct, frozen=True, kw_only=True, tag_field="type", tag="text"):
    text: str


class InputTextPart(TextPart, frozen=True, kw_only=True, tag="input_text"):
    """A text part under the name of OpenAI's Responses API, in a user's message."""


class OutputTextPart(TextPart, frozen=True, kw_only=True, tag="output_text"):
    """A text part under the name of OpenAI's Responses API, in an assistant's message."""


class RefusalPart(Struct, frozen=True, kw_only=True, tag_field="type", tag="refusal"):
    """What an assistant answered instead of an answer; text like any other here."""

    refusal: str


Content = str | list[str | TextPart | InputTextPart | OutputTextPart | RefusalPart]


def texts_of(content: Content | None) -> list[str]:
    """The texts of a message, one for each part."""
    if content is None or isinstance(content, str):
        return [content or ""]
    return [
        part if isinstance(part, str) else part.refusal if isinstance(part, RefusalPart) else part.text
        for part in content
    ]


class FunctionCall(Struct, frozen=True, kw_only=True):
    """`arguments` is JSON as text, as in OpenAI's API, or the object itself."""

    name: FunctionName
    arguments: str | dict[str, Any] | None = None

    @property
    def arguments_json(self) -> str:
        """The arguments as JSON text."""
        if isinstance(self.arguments, str):
            return self.arguments
        return json.dumps(self.arguments or {}, ensure_ascii=False)


class ToolCall(Struct, frozen=True, kw_only=True):
    id: Annotated[str, Meta(min_length=1, max_length=128)]
    function: FunctionCall
    type: Literal["function"] | None = None
    # Ignored: some clients send it back with a streamed call.
    index: int | None = None


class SystemMessage(Struct, frozen=True, kw_only=True, tag_field="role", tag="system"):
    """`name`, here and in the other messages: of the author. It acts if the chat template reads it; Mistral's do not."""

    content: Content
    name: str | None = None


class DeveloperMessage(Struct, frozen=True, kw_only=True, tag_field="role", tag="developer"):
    content: Content
    name: str | None = None


class UserMessage(Struct, frozen=True, kw_only=True, tag_field="role", tag="user"):
    content: Content
    name: str | None = None


class AssistantMessage(Struct, frozen=True, kw_only=True, tag_field="role", tag="assistant"):
    """`prefix` on the last message: the response continues it. `refusal`: the text if there is no `content`."""

    content: Content | None = None
    tool_calls: list[ToolCall] | None = None
    prefix: bool | None = None
    refusal: str | None = None
    name: str | None = None


class ToolMessage(Struct, frozen=True, kw_only=True, tag_field="role", tag="tool"):
    """The result of a tool call. `name` may repeat the function's name. `content`: null means empty."""

    tool_call_id: Annotated[str, Meta(min_length=1, max_length=128)]
    content: Content | None = None
    name: str | None = None


ChatMessage = SystemMessage | DeveloperMessage | UserMessage | AssistantMessage | ToolMessage


class FunctionDefinition(Struct, frozen=True, kw_only=True):
    """`parameters` is a JSON schema. `strict`: refuse a schema that cannot be enforced completely, instead of loosening it."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Struct, frozen=True, kw_only=True):
    function: FunctionDefinition
    type: Literal["function"] | None = None


def function_tool(
    name: str, parameters: dict[str, Any] | None, *, description: str | None, strict: bool | None
) -> Tool:
    """A tool from the flat form that other APIs have. `parameters`: a JSON schema."""
    return Tool(function=FunctionDefinition(name=name, description=description, parameters=parameters, strict=strict))


class FunctionChoice(Struct, frozen=True, kw_only=True):
    name: FunctionName


class NamedToolChoice(Struct, frozen=True, kw_only=True):
    function: FunctionChoice
    type: Literal["function"] | None = None


class ChatRequest(GenerationRequest, frozen=True, kw_only=True):
    """`max_completion_tokens` is the newer name of `max_tokens`. `safe_prompt` puts Mistral's safety prompt before the conversation.

    `tool_choice`: "any" is Mistral's name for "required". With `tools`, `response_format` binds the text and the tools bind the calls.
    vLLM's names for how the chat template is applied: `continue_final_message`: the response continues the last message, as `prefix` on
    that message does. `add_generation_prompt`: whether the prompt ends with the beginning of the assistant's turn; true by default.
    `chat_template_kwargs`: variables for the template.
    """

    messages: Annotated[list[ChatMessage], Meta(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Meta(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: NumLogprobs | None = None
    tools: Annotated[list[Tool], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required", "any"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    safe_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: TemplateKwargs | None = None


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
    """`content` is null if there are only tool calls or thoughts. `reasoning_content`: what a model thought, by vLLM's name."""

    content: str | None
    role: str = "assistant"
    refusal: None = None
    tool_calls: list[ResponseToolCall] | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET


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
    reasoning_content: str | None = None


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
