"""From a response's steps to its events and its output. Pure: the same steps always give the same events.

Knows the order of events and the items of an output. A message's text and a function's arguments arrive in pieces; an item ends where
the next one begins, or with the response.

Worked example: the steps "Hi", " you", end give created 0, in_progress 1, output_item.added 2, content_part.added 3, output_text.delta 4
and 5, output_text.done 6, content_part.done 7, output_item.done 8, completed 9.
"""

from collections.abc import Iterable, Iterator

import msgspec

from cluster.responses import events
from cluster.responses.events import ResponseEvent
from cluster.responses.items import (
    Asked,
    FunctionCallItem,
    IncompleteDetails,
    ItemStatus,
    OutputItem,
    OutputMessage,
    OutputText,
    TextLogprob,
)
from cluster.responses.records import ResponseRecord, Step, item_id, show, usage_of


class EventBuilder:
    """`start`, then `push` for every step, then `finish`. record, asked: of the response; of the record only what never changes counts."""

    def __init__(self, record: ResponseRecord, asked: Asked) -> None:
        self._asked = asked
        self._at_first = msgspec.structs.replace(
            record,
            status="queued" if asked.background else "in_progress",
            output=[],
            usage=None,
            completed_at=None,
            error=None,
            incomplete_details=None,
        )
        self._ended: list[OutputItem] = []
        self._open: OutputItem | None = None
        self._pieces: list[str] = []  # of the open item
        self._logprobs: list[TextLogprob] = []
        self.num_events = 0  # so far: the number of the next

    @property
    def _index(self) -> int:
        return len(self._ended)

    def _number(self) -> int:
        number, self.num_events = self.num_events, self.num_events + 1
        return number

    def start(self) -> Iterator[ResponseEvent]:
        """The events before the first step."""
        shown = show(self._at_first, self._asked)
        yield events.CreatedEvent(sequence_number=self._number(), response=shown)
        if self._asked.background:
            yield events.QueuedEvent(sequence_number=self._number(), response=shown)
            shown = msgspec.structs.replace(shown, status="in_progress")
        yield events.InProgressEvent(sequence_number=self._number(), response=shown)

    def push(self, step: Step) -> Iterator[ResponseEvent]:
        """What one step adds."""
        if step.text or step.logprobs:
            if not isinstance(self._open, OutputMessage):
                yield from self._close("completed")
                yield from self._open_message()
            assert self._open is not None
            self._pieces.append(step.text)
            self._logprobs += step.logprobs
            yield events.TextDeltaEvent(
                sequence_number=self._number(),
                item_id=self._open.id,
                output_index=self._index,
                content_index=0,
                delta=step.text,
                logprobs=step.logprobs,
            )
        for piece in step.calls:
            if piece.id is not None:
                yield from self._close("completed")
                yield from self._open_call(piece.id, piece.name or "")
            if piece.arguments and isinstance(self._open, FunctionCallItem):
                self._pieces.append(piece.arguments)
                yield events.ArgumentsDeltaEvent(
                    sequence_number=self._number(),
                    item_id=self._open.id,
                    output_index=self._index,
                    delta=piece.arguments,
                )

    def finish(self, record: ResponseRecord) -> Iterator[ResponseEvent]:
        """The last events. record: as it has ended."""
        if record.status == "completed" and not self._ended and self._open is None:
            yield from self._open_message()  # the model said nothing
        yield from self._close("completed" if record.status == "completed" else "incomplete")
        number, shown = self._number(), show(record, self._asked)
        if record.status == "completed":
            yield events.CompletedEvent(sequence_number=number, response=shown)
        elif record.status == "failed":
            yield events.FailedEvent(sequence_number=number, response=shown)
        else:
            yield events.IncompleteEvent(sequence_number=number, response=shown)

    def output(self, status: ItemStatus) -> list[OutputItem]:
        """The items so far; status: of the one that is open. Call it after the last step."""
        for _ in self._close(status):
            pass
        return self._ended

    def _open_message(self) -> Iterator[ResponseEvent]:
        message = OutputMessage(id=item_id(self._at_first.id, "msg", self._index), status="in_progress", content=[])
        self._open = message
        yield events.ItemAddedEvent(sequence_number=self._number(), output_index=self._index, item=message)
        yield events.PartAddedEvent(
            sequence_number=self._number(),
            item_id=message.id,
            output_index=self._index,
            content_index=0,
            part=OutputText(text=""),
        )

    def _open_call(self, call_id: str, name: str) -> Iterator[ResponseEvent]:
        call = FunctionCallItem(
            id=item_id(self._at_first.id, "fc", self._index),
            call_id=call_id,
            name=name,
            arguments="",
            status="in_progress",
        )
        self._open = call
        yield events.ItemAddedEvent(sequence_number=self._number(), output_index=self._index, item=call)

    def _close(self, status: ItemStatus) -> Iterator[ResponseEvent]:
        item, index = self._open, self._index
        if item is None:
            return
        text, logprobs = "".join(self._pieces), self._logprobs
        self._open, self._pieces, self._logprobs = None, [], []
        done: OutputItem
        if isinstance(item, OutputMessage):
            part = OutputText(text=text, logprobs=logprobs)
            done = msgspec.structs.replace(item, status=status, content=[part])
            yield events.TextDoneEvent(
                sequence_number=self._number(),
                item_id=item.id,
                output_index=index,
                content_index=0,
                text=text,
                logprobs=logprobs,
            )
            yield events.PartDoneEvent(
                sequence_number=self._number(), item_id=item.id, output_index=index, content_index=0, part=part
            )
        else:
            done = msgspec.structs.replace(item, status=status, arguments=text)
            yield events.ArgumentsDoneEvent(
                sequence_number=self._number(), item_id=item.id, output_index=index, name=item.name, arguments=text
            )
        self._ended.append(done)
        yield events.ItemDoneEvent(sequence_number=self._number(), output_index=index, item=done)


def end(
    record: ResponseRecord, asked: Asked, steps: Iterable[Step], *, num_prompt_tokens: int, now: float
) -> ResponseRecord:
    """The record of a response whose last step has a finish_reason."""
    done = list(steps)
    is_whole = done[-1].finish_reason != "length"
    return msgspec.structs.replace(
        record,
        status="completed" if is_whole else "incomplete",
        completed_at=int(now) if is_whole else None,
        incomplete_details=None if is_whole else IncompleteDetails(reason="max_output_tokens"),
        output=output_of(record, asked, done, status="completed" if is_whole else "incomplete"),
        usage=usage_of(num_prompt_tokens, done),
    )


def output_of(record: ResponseRecord, asked: Asked, steps: Iterable[Step], *, status: ItemStatus) -> list[OutputItem]:
    """The items that the steps give; status: of the last one."""
    builder = EventBuilder(record, asked)
    for step in steps:
        for _ in builder.push(step):
            pass
    output = builder.output(status)
    if not output and status == "completed":
        output = [OutputMessage(id=item_id(record.id, "msg", 0), status="completed", content=[OutputText(text="")])]
    return output
