"""The request and answer bodies: one declaration serves validation now and an OpenAPI page later.

Knows types, bounds and OpenAI's names; what needs the model (context length, vocabulary) is checked in sampling.py. Strict: an
unknown field, and a known one this server does not act on, is refused by its name instead of being ignored.
"""

import re
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta, Struct

from workers.errors import RequestError

MAX_STOP_STRINGS = 4
MAX_LOGPROBS = 20

Fraction = Annotated[float, Meta(ge=0.0, le=1.0)]
Penalty = Annotated[float, Meta(ge=-2.0, le=2.0)]
StopString = Annotated[str, Meta(min_length=1, max_length=256)]
Bias = Annotated[float, Meta(ge=-100.0, le=100.0)]
Int64 = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]


class StreamOptions(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    include_usage: bool | None = None


class GenerationRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What both endpoints take. null means the default, as with OpenAI; `user` is accepted and not used."""

    model: str
    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: (
        Annotated[str, Meta(max_length=256)] | Annotated[list[StopString], Meta(max_length=MAX_STOP_STRINGS)] | None
    ) = None
    temperature: Annotated[float, Meta(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[dict[int, Bias], Meta(max_length=1024)] | None = None
    seed: Int64 | None = None
    user: str | None = None
    # Beyond OpenAI, named as vLLM names them.
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None  # -1 and 0 are off
    min_p: Fraction | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100.0)] | None = None
    min_tokens: Annotated[int, Meta(ge=0)] | None = None
    stop_token_ids: Annotated[list[int], Meta(max_length=128)] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    priority: Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)] | None = None  # smaller runs first

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class CompletionRequest(GenerationRequest, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """/v1/completions. `prompt` is a text, a list of texts, a list of token ids, or a list of such lists."""

    prompt: str | list[str | int | list[int]]
    logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    best_of: int | None = None


class TextPart(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="text"):
    text: str


Content = str | list[TextPart]
NoItems = Annotated[list[Any], Meta(max_length=0)]


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
    """`prefix` on the last message: the answer continues it. The null fields let a client send an answer back as it got it."""

    content: Content
    prefix: bool | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: NoItems | None = None
    tool_calls: NoItems | None = None


ChatMessage = SystemMessage | DeveloperMessage | UserMessage | AssistantMessage


class ChatRequest(GenerationRequest, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """/v1/chat/completions. `max_completion_tokens` is the newer name of `max_tokens`."""

    messages: Annotated[list[ChatMessage], Meta(min_length=1)]
    max_completion_tokens: Annotated[int, Meta(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None


# OpenAI's parameters that this server does not act on, and the values that ask for nothing.
UNSUPPORTED: dict[type[GenerationRequest], dict[str, tuple[Any, ...]]] = {
    CompletionRequest: {
        "suffix": (None, ""),
        "echo": (None, False),
        "metadata": (None, {}),
        "service_tier": (None, "auto", "default"),
        "store": (None, False),
    },
    ChatRequest: {
        "tools": (None, []),
        "tool_choice": (None, "none"),
        "parallel_tool_calls": (None,),
        "functions": (None, []),
        "function_call": (None, "none"),
        "response_format": (None, {"type": "text"}),
        "modalities": (None, ["text"]),
        "audio": (None,),
        "prediction": (None,),
        "reasoning_effort": (None,),
        "verbosity": (None,),
        "web_search_options": (None,),
        "metadata": (None, {}),
        "service_tier": (None, "auto", "default"),
        "store": (None, False),
    },
}

RequestT = TypeVar("RequestT", bound=GenerationRequest)
_UNKNOWN_FIELD = re.compile(r"unknown field `([^`]*)`")
_MISSING_FIELD = re.compile(r"missing required field `([^`]*)`(?: - at `\$\.?([^`]*)`)?")
_AT = re.compile(r" - at (?:`key` in )?`\$\.?([^`]*)`$")


def parse(body: bytes, kind: type[RequestT]) -> RequestT:
    """The validated request. Raises RequestError naming the field."""
    try:
        fields = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
        raise RequestError(f"The request body is not valid JSON: {e}.", code="invalid_json") from e
    if not isinstance(fields, dict):
        raise RequestError("The request body must be a JSON object.", code="invalid_json")
    for name, neutral in UNSUPPORTED[kind].items():
        if name in fields and fields.pop(name) not in neutral:
            raise RequestError(
                f"{name!r} is not supported by this server; leave it out.", param=name, code="unsupported_parameter"
            )
    try:
        return msgspec.convert(fields, kind, str_keys=True)
    except (msgspec.ValidationError, OverflowError) as e:
        raise _explain(str(e)) from e


def _explain(message: str) -> RequestError:
    at = _AT.search(message)
    path = at[1].replace("[...]", "") if at else ""
    param = re.split(r"[.\[]", path)[0] or None
    if unknown := _UNKNOWN_FIELD.search(message):
        name = f"{path}.{unknown[1]}" if path else unknown[1]
        return RequestError(
            f"Unrecognized request argument supplied: {name}", param=param or unknown[1], code="unknown_parameter"
        )
    if missing := _MISSING_FIELD.search(message):
        name = f"{path}.{missing[1]}" if path else missing[1]
        return RequestError(f"You must provide {name!r}.", param=param or missing[1], code="missing_required_parameter")
    what = message[: at.start()] if at else message
    what = what[:1].lower() + what[1:]
    if path.endswith(".role"):
        what += "; use 'system', 'developer', 'user' or 'assistant' (tools are not supported)"
    elif path.endswith(".type"):
        what += "; only parts of type 'text' are supported"
    return RequestError(f"Invalid value for {path or 'the request'!r}: {what}.", param=param, code="invalid_value")


# Answers.


class PromptTokensDetails(Struct, frozen=True, kw_only=True):
    cached_tokens: int


class Usage(Struct, frozen=True, kw_only=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionLogprobs(Struct, frozen=True, kw_only=True):
    """Parallel lists. `text_offset` counts characters from the start of this choice's text."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(Struct, frozen=True, kw_only=True):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None


class Completion(Struct, frozen=True, kw_only=True):
    """An answer, and, streamed, one chunk of it: they have the same shape."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    object: str = "text_completion"
    usage: Usage | None = None


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


class ChatAnswer(Struct, frozen=True, kw_only=True):
    content: str
    role: str = "assistant"
    refusal: None = None


class ChatChoice(Struct, frozen=True, kw_only=True):
    index: int
    message: ChatAnswer
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None


class ChatCompletion(Struct, frozen=True, kw_only=True):
    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    object: str = "chat.completion"
    usage: Usage | None = None


class ChatDelta(Struct, frozen=True, kw_only=True, omit_defaults=True):
    role: str | None = None
    content: str | None = None


class ChatChunkChoice(Struct, frozen=True, kw_only=True):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None


class ChatChunk(Struct, frozen=True, kw_only=True):
    id: str
    created: int
    model: str
    choices: list[ChatChunkChoice]
    object: str = "chat.completion.chunk"
    usage: Usage | None = None


class ModelCard(Struct, frozen=True, kw_only=True):
    id: str
    created: int
    max_model_len: int | None
    object: str = "model"
    owned_by: str = "tramontane"


class ModelList(Struct, frozen=True, kw_only=True):
    data: list[ModelCard]
    object: str = "list"
