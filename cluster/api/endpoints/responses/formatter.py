"""Formats a response that is not stored: whole, or as events. Knows one request's output; the events come from cluster/responses."""

import time
from collections.abc import Iterator, Sequence

import msgspec

from cluster.api.context import ApiContext
from cluster.api.generation.generation import Choice, Event, Whole
from cluster.api.server.errors import describe
from cluster.api.server.sse import encode_named
from cluster.api.stored.steps import to_step
from cluster.responses.build import EventBuilder, end
from cluster.responses.events import ErrorEvent, ResponseEvent
from cluster.responses.items import Asked, Response
from cluster.responses.records import ResponseRecord, Step, show
from cluster.text.output.output_text import OutputStep


class ResponseFormatter:
    """A Formatter (generation/answering.py) for one request."""

    def __init__(
        self, api: ApiContext, record: ResponseRecord, asked: Asked, choice: Choice, *, shows_logprobs: bool
    ) -> None:
        self._api = api
        self._record = record
        self._asked = asked
        self._choice = choice
        self._shows_logprobs = shows_logprobs
        self._builder = EventBuilder(record, asked)
        self._steps: list[Step] = []

    def whole(self, wholes: Sequence[Whole]) -> Response:
        [whole] = wholes
        for i, step in enumerate(whole.steps):
            self._steps.append(self._step(step, whole.token_ids if i == 0 else []))
        return show(self._end(), self._asked)

    def chunks(self, event: Event) -> Iterator[ResponseEvent]:
        if not self._steps:
            yield from self._builder.start()
        step = self._step(event.step, event.token_ids)
        self._steps.append(step)
        yield from self._builder.push(step)
        if step.finish_reason is not None:
            yield from self._builder.finish(self._end())

    def last_chunks(self) -> Sequence[msgspec.Struct]:
        return ()

    def error(self, error: Exception) -> bytes:
        """For the stream's wire."""
        return error_event(error, number=self._builder.num_events)

    def _step(self, step: OutputStep, token_ids: list[int]) -> Step:
        cached = self._choice.num_cached_tokens if not self._steps else None
        return to_step(
            self._api, step, token_ids=token_ids, num_cached_tokens=cached, shows_logprobs=self._shows_logprobs
        )

    def _end(self) -> ResponseRecord:
        num_prompt_tokens = len(self._choice.request.prompt_token_ids)
        return end(self._record, self._asked, self._steps, num_prompt_tokens=num_prompt_tokens, now=time.time())


def error_event(error: Exception, *, number: int) -> bytes:
    """The bytes of the event for a stream that cannot go on."""
    _, body = describe(error)
    return encode_named(
        ErrorEvent(sequence_number=number, code=body.code or body.type, message=body.message, param=body.param)
    )
