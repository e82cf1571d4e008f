"""The events of a streamed response, in the form of OpenAI's Responses API. Knows the form only; build.py decides which come when.

Every event has a `sequence_number`, from 0 on, by which a client that lost its connection goes on.
"""

from msgspec import Struct

from cluster.responses.items import OutputItem, OutputText, Response, TextLogprob


class _Event(Struct, frozen=True, kw_only=True, tag_field="type"):
    sequence_number: int


class _Lifecycle(_Event, frozen=True, kw_only=True):
    response: Response


class CreatedEvent(_Lifecycle, frozen=True, kw_only=True, tag="response.created"):
    """The first event."""


class QueuedEvent(_Lifecycle, frozen=True, kw_only=True, tag="response.queued"):
    """A background response waits for its turn."""


class InProgressEvent(_Lifecycle, frozen=True, kw_only=True, tag="response.in_progress"):
    """The response is being generated."""


class CompletedEvent(_Lifecycle, frozen=True, kw_only=True, tag="response.completed"):
    """The last event of a whole response."""


class IncompleteEvent(_Lifecycle, frozen=True, kw_only=True, tag="response.incomplete"):
    """The last event of a response that reached its limit of tokens, or that was cancelled: its status says which."""


class FailedEvent(_Lifecycle, frozen=True, kw_only=True, tag="response.failed"):
    """The last event of a response that failed."""


class ItemAddedEvent(_Event, frozen=True, kw_only=True, tag="response.output_item.added"):
    output_index: int
    item: OutputItem


class ItemDoneEvent(_Event, frozen=True, kw_only=True, tag="response.output_item.done"):
    output_index: int
    item: OutputItem


class PartAddedEvent(_Event, frozen=True, kw_only=True, tag="response.content_part.added"):
    item_id: str
    output_index: int
    content_index: int
    part: OutputText


class PartDoneEvent(_Event, frozen=True, kw_only=True, tag="response.content_part.done"):
    item_id: str
    output_index: int
    content_index: int
    part: OutputText


class TextDeltaEvent(_Event, frozen=True, kw_only=True, tag="response.output_text.delta"):
    item_id: str
    output_index: int
    content_index: int
    delta: str
    logprobs: list[TextLogprob]


class TextDoneEvent(_Event, frozen=True, kw_only=True, tag="response.output_text.done"):
    item_id: str
    output_index: int
    content_index: int
    text: str
    logprobs: list[TextLogprob]


class ArgumentsDeltaEvent(_Event, frozen=True, kw_only=True, tag="response.function_call_arguments.delta"):
    item_id: str
    output_index: int
    delta: str


class ArgumentsDoneEvent(_Event, frozen=True, kw_only=True, tag="response.function_call_arguments.done"):
    item_id: str
    output_index: int
    name: str
    arguments: str


class ErrorEvent(_Event, frozen=True, kw_only=True, tag="error"):
    """The stream cannot go on; the response itself may. It does not belong to the response, so its number is the next event's."""

    code: str | None
    message: str
    param: str | None = None


ResponseEvent = (
    CreatedEvent
    | QueuedEvent
    | InProgressEvent
    | CompletedEvent
    | IncompleteEvent
    | FailedEvent
    | ItemAddedEvent
    | ItemDoneEvent
    | PartAddedEvent
    | PartDoneEvent
    | TextDeltaEvent
    | TextDoneEvent
    | ArgumentsDeltaEvent
    | ArgumentsDoneEvent
    | ErrorEvent
)
