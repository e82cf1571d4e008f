"""The items of a response's output, and the response itself, in the form of OpenAI's Responses API.

Knows the form only. build.py makes items from what a model generated; cluster/api/schemas/responses has the items of an input.
"""

from typing import Any, Literal

from msgspec import Struct

Status = Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
ItemStatus = Literal["in_progress", "completed", "incomplete"]


class TextTopLogprob(Struct, frozen=True, kw_only=True):
    token: str
    logprob: float
    bytes: list[int]


class TextLogprob(Struct, frozen=True, kw_only=True):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TextTopLogprob]


class OutputText(Struct, frozen=True, kw_only=True, tag_field="type", tag="output_text"):
    """`annotations` is always empty: the model cites no files."""

    text: str
    annotations: list[Any] = []
    logprobs: list[TextLogprob] = []


class OutputMessage(Struct, frozen=True, kw_only=True, tag_field="type", tag="message"):
    id: str
    status: ItemStatus
    content: list[OutputText]
    role: Literal["assistant"] = "assistant"


class FunctionCallItem(Struct, frozen=True, kw_only=True, tag_field="type", tag="function_call"):
    """A call of one of the request's functions. `arguments` is JSON as text; a `function_call_output` names the `call_id`."""

    id: str
    call_id: str
    name: str
    arguments: str
    status: ItemStatus


OutputItem = OutputMessage | FunctionCallItem


class ResponseError(Struct, frozen=True, kw_only=True):
    """`code`: one of OpenAI's for responses."""

    code: Literal["server_error", "rate_limit_exceeded", "invalid_prompt"]
    message: str


class IncompleteDetails(Struct, frozen=True, kw_only=True):
    reason: Literal["max_output_tokens"]


class ResponseInputDetails(Struct, frozen=True, kw_only=True):
    cached_tokens: int
    cache_write_tokens: int = 0


class ResponseOutputDetails(Struct, frozen=True, kw_only=True):
    reasoning_tokens: int = 0


class ResponseUsage(Struct, frozen=True, kw_only=True):
    input_tokens: int
    input_tokens_details: ResponseInputDetails
    output_tokens: int
    total_tokens: int
    output_tokens_details: ResponseOutputDetails = ResponseOutputDetails()


class Asked(Struct, frozen=True, kw_only=True):
    """What a response repeats of its request, with the defaults filled in."""

    model: str
    instructions: str | None = None
    previous_response_id: str | None = None
    background: bool = False
    store: bool = True
    max_output_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_logprobs: int = 0
    parallel_tool_calls: bool = True
    tool_choice: Any = "auto"
    tools: list[dict[str, Any]] = []
    text: dict[str, Any] = {}
    reasoning: dict[str, Any] = {}
    truncation: Literal["auto", "disabled"] = "disabled"
    metadata: dict[str, str] = {}
    user: str | None = None


class Response(Asked, frozen=True, kw_only=True):
    """`error`: if its status is failed. `incomplete_details`: if its status is incomplete. `usage`: null until it has ended."""

    id: str
    created_at: int
    status: Status
    output: list[OutputItem]
    completed_at: int | None = None
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    usage: ResponseUsage | None = None
    object: Literal["response"] = "response"
    service_tier: Literal["default"] = "default"
    max_tool_calls: None = None
