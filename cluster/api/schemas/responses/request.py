"""Body of /v1/responses and of its smaller relatives, and the items of an input. The response is in cluster/responses/items.py.

Knows types and bounds, and OpenAI's names; vLLM's for what OpenAI does not have. A message may leave out its `type`, see `name_items`.
"""

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from cluster.api.schemas.base import (
    MAX_STOP_CHARS,
    MAX_STOP_STRINGS,
    Fraction,
    Int64,
    NumLogprobs,
    Penalty,
    Priority,
    StopString,
    StreamOptions,
    UserName,
)
from cluster.api.schemas.chat import (
    MAX_MESSAGES,
    MAX_TOOLS,
    FunctionName,
    InputTextPart,
    OutputTextPart,
    RefusalPart,
    TextPart,
)
from cluster.api.schemas.structured import JsonObjectFormat, TextFormat

MAX_INSTRUCTIONS_CHARS = 1_000_000
Metadata = Annotated[
    dict[Annotated[str, Meta(max_length=64)], Annotated[str, Meta(max_length=512)]], Meta(max_length=16)
]
ItemId = Annotated[str, Meta(max_length=128)]
CallId = Annotated[str, Meta(min_length=1, max_length=128)]


class InputImagePart(Struct, frozen=True, kw_only=True, tag_field="type", tag="input_image"):
    """Refused by name: the model reads text only."""


class InputFilePart(Struct, frozen=True, kw_only=True, tag_field="type", tag="input_file"):
    """Refused by name: the model reads text only."""


class InputAudioPart(Struct, frozen=True, kw_only=True, tag_field="type", tag="input_audio"):
    """Refused by name: the model reads text only."""


Part = TextPart | InputTextPart | OutputTextPart | RefusalPart | InputImagePart | InputFilePart | InputAudioPart
Parts = str | list[Part]


class InputMessage(Struct, frozen=True, kw_only=True, tag_field="type", tag="message"):
    """`id`, `status`, `phase`: of a message that was an output. They have no meaning here."""

    role: Literal["user", "assistant", "system", "developer"]
    content: Parts
    id: ItemId | None = None
    status: str | None = None
    phase: str | None = None


class InputFunctionCall(Struct, frozen=True, kw_only=True, tag_field="type", tag="function_call"):
    """A call that the model made in an earlier response."""

    call_id: CallId
    name: FunctionName
    arguments: str
    id: ItemId | None = None
    status: str | None = None


class InputFunctionOutput(Struct, frozen=True, kw_only=True, tag_field="type", tag="function_call_output"):
    """The result of the call with this `call_id`."""

    call_id: CallId
    output: Parts
    id: ItemId | None = None
    status: str | None = None
    name: str | None = None


class InputReasoning(Struct, frozen=True, kw_only=True, tag_field="type", tag="reasoning"):
    """The thoughts of a reasoning model, which are not part of the conversation here."""

    id: ItemId | None = None
    summary: list[Any] | None = None
    content: list[Any] | None = None
    encrypted_content: str | None = None
    status: str | None = None


InputItem = InputMessage | InputFunctionCall | InputFunctionOutput | InputReasoning
Input = (
    Annotated[str, Meta(max_length=16_000_000)]
    | Annotated[list[InputItem], Meta(min_length=1, max_length=MAX_MESSAGES)]
)


class ResponseTool(Struct, frozen=True, kw_only=True):
    """A function. `parameters` is a JSON schema. `strict`: refuse a schema that cannot be enforced completely."""

    type: Literal["function"]
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionToolChoice(Struct, frozen=True, kw_only=True, tag_field="type", tag="function"):
    name: FunctionName


class AllowedTool(Struct, frozen=True, kw_only=True):
    type: Literal["function"]
    name: FunctionName


class AllowedTools(Struct, frozen=True, kw_only=True, tag_field="type", tag="allowed_tools"):
    """`tools`: those of the request's that may be called now."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[AllowedTool], Meta(min_length=1, max_length=MAX_TOOLS)]


ResponseToolChoice = Literal["none", "auto", "required"] | FunctionToolChoice | AllowedTools


class TextSchemaFormat(Struct, frozen=True, kw_only=True, tag_field="type", tag="json_schema"):
    """JSON that always follows `schema`, whatever `strict` says."""

    name: Annotated[str, Meta(min_length=1, max_length=64)]
    schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None


class TextConfig(Struct, frozen=True, kw_only=True):
    format: TextFormat | JsonObjectFormat | TextSchemaFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class Reasoning(Struct, frozen=True, kw_only=True):
    """Settings of reasoning models. The model does not reason, so that "none" and "minimal" are what happens."""

    effort: Annotated[str, Meta(max_length=16)] | None = None
    summary: Annotated[str, Meta(max_length=16)] | None = None
    generate_summary: Annotated[str, Meta(max_length=16)] | None = None


Includable = Literal[
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
    "reasoning.encrypted_content",
    "message.output_text.logprobs",
]


class ResponseInput(Struct, frozen=True, kw_only=True):
    """What decides the prompt. `instructions`: a system message for this response only. `truncation`: "auto" leaves out the oldest messages
    of a conversation that is too long.
    """

    model: str
    input: Input
    instructions: Annotated[str, Meta(max_length=MAX_INSTRUCTIONS_CHARS)] | None = None
    previous_response_id: ItemId | None = None
    tools: Annotated[list[ResponseTool], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: ResponseToolChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    truncation: Literal["auto", "disabled"] | None = None


class ResponseRequest(ResponseInput, frozen=True, kw_only=True):
    """`store`: true by default. A stored response runs to its end without its client, and can be retrieved, streamed again and continued.
    `background`: answer at once; the response is generated later. `include`: "message.output_text.logprobs" acts.

    From `seed` on, additions with vLLM's names, as in chat.
    """

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    store: bool | None = None
    background: bool | None = None
    metadata: Metadata | None = None
    include: list[Includable] | None = None
    max_output_tokens: Annotated[int, Meta(ge=1)] | None = None
    temperature: Annotated[float, Meta(ge=0.0, le=2.0)] | None = None
    top_p: Fraction | None = None
    top_logprobs: NumLogprobs | None = None
    user: UserName | None = None
    seed: Int64 | None = None
    stop: (
        Annotated[str, Meta(max_length=MAX_STOP_CHARS)]
        | Annotated[list[StopString], Meta(max_length=MAX_STOP_STRINGS)]
        | None
    ) = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    min_p: Fraction | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100.0)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    min_tokens: Annotated[int, Meta(ge=0)] | None = None
    ignore_eos: bool | None = None
    priority: Priority | None = None


class InputTokens(Struct, frozen=True, kw_only=True):
    input_tokens: int
    object: Literal["response.input_tokens"] = "response.input_tokens"


class ResponseDeleted(Struct, frozen=True, kw_only=True):
    id: str
    deleted: bool = True
    object: Literal["response"] = "response"


class InputItemList(Struct, frozen=True, kw_only=True):
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool
    object: Literal["list"] = "list"


def name_items(fields: dict[str, Any]) -> None:
    """Adds the `type` that a message may leave out, in a body that was decoded and not yet checked."""
    items = fields.get("input")
    for item in items if isinstance(items, list) else ():
        if isinstance(item, dict) and "type" not in item and "role" in item:
            item["type"] = "message"
