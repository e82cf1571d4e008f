"""Streams a stored response: all of its events, or those after the last one that a client has seen. Every client gets the same ones."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from aiohttp import web

from cluster.api.context import CONTEXT
from cluster.api.endpoints.responses.access import service_of
from cluster.api.endpoints.responses.formatter import error_event
from cluster.api.server import request_options, sse
from cluster.api.stored.service import Progress, ResponseService
from cluster.responses.build import EventBuilder
from cluster.responses.events import ResponseEvent
from cluster.responses.records import Stored


async def stream_stored(request: web.Request, stored: Stored, *, starting_after: int) -> web.StreamResponse:
    """Until the response has ended, wherever it runs."""
    builder = EventBuilder(stored.record, stored.request.asked)
    moved_note = request_options.MovedNote()
    num_changes = stored.record.num_numerics_changes

    def events(progress: Progress) -> list[ResponseEvent]:
        nonlocal num_changes
        num_changes = max(num_changes, progress.num_numerics_changes)
        made = list(builder.start()) if builder.num_events == 0 else []
        for step in progress.steps:
            made += builder.push(step)
        if progress.record is not None:
            made += builder.finish(progress.record)
        return [event for event in made if event.sequence_number > starting_after]

    wire = sse.Wire(encode=sse.encode_named, error=lambda e: error_event(e, number=builder.num_events), end=b"")
    async with aclosing(_from_the_start(service_of(request), stored)) as progress:
        return await sse.stream(
            request,
            progress,
            chunks=events,
            wire=wire,
            headers=lambda: request_options.moved_headers(num_changes),
            note=lambda: moved_note(num_changes),
            keep_alive_s=request.app[CONTEXT].keep_alive_s,
        )


async def _from_the_start(service: ResponseService, stored: Stored) -> AsyncGenerator[Progress, None]:
    """The events before the first step are sent at once."""
    yield Progress([], None)
    async with aclosing(service.follow(stored.record.id)) as following:
        async for progress in following:
            yield progress
