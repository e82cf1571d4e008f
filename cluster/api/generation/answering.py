"""Runs the sequences of one request and sends the response, whole or as a stream: what completions and chat have in common.

Knows admission and the two forms of a response; an endpoint's `Formatter` decides what is in them. Checks the combinations of fields
that no endpoint allows.
"""

import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec
from aiohttp import web

from cluster.api.context import ApiContext
from cluster.api.generation.generation import Choice, Event, Whole, admit, collect, run
from cluster.api.request_context import RequestContext
from cluster.api.schemas.base import GenerationRequest
from cluster.api.server import request_options, sse
from cluster.api.server.shortcut import Shortcut
from workers.errors import RequestError

log = logging.getLogger(__name__)


class Formatter(Protocol):
    """Turns generated text into the response structs of one endpoint, for one request."""

    def whole(self, wholes: Sequence[Whole]) -> msgspec.Struct:
        """The response in one piece."""

    def chunks(self, event: Event) -> Iterable[msgspec.Struct | bytes]:
        """The chunks of a stream for one delta. Bytes: one that is encoded already."""

    def last_chunks(self) -> Iterable[msgspec.Struct]:
        """The chunks before the end of a stream."""


def check_shape(
    api: ApiContext, body: GenerationRequest, context: RequestContext, *, num_prompts: int, num_copies: int
) -> None:
    """Raises RequestError if fields contradict each other or request too many sequences."""
    if not body.stream:
        api.ignore(context, stream_options=body.stream_options)
    if None not in (body.seed, body.random_seed) and body.seed != body.random_seed:
        raise RequestError(
            "'seed' and 'random_seed' mean the same and differ.", remedy="Send one of them.", param="random_seed"
        )
    if body.continuous_usage and not body.include_usage:
        raise RequestError(
            "'continuous_usage_stats' needs 'include_usage'.",
            remedy="Set 'include_usage' to true as well.",
            param="stream_options",
        )
    if not all(body.stop_strings):
        raise RequestError("'stop' contains an empty string.", remedy="Remove it.", param="stop")
    total, most = num_prompts * num_copies, api.max_sequences_per_request
    if total > most:
        raise RequestError(
            f"The request asks for {total} sequences ({num_prompts} prompts times {num_copies}); the limit is {most} per request.",
            remedy="Split it into several requests.",
            param="n" if num_prompts <= most else "prompt",
        )


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A checked and encoded request, ready to run."""

    body: GenerationRequest
    choices: Sequence[Choice]
    formatter: Formatter
    wire: sse.Wire = sse.CHUNKS


async def answer(
    http_request: web.Request, api: ApiContext, prepared: Prepared, *, deadline: float | None, arrived: float
) -> web.StreamResponse:
    """Runs the choices and sends the response. Raises what `admit` and `run` raise, until the first byte was sent."""
    moved_note = request_options.MovedNote()

    def num_changes() -> int:
        return request_options.num_numerics_changes(prepared.choices)

    def headers() -> dict[str, str]:
        moved = request_options.moved_headers(num_changes())
        return moved | request_options.debug_headers(http_request, prepared.choices)

    def is_gone() -> bool:
        return http_request.transport is None or http_request.transport.is_closing()

    if not prepared.body.stream:
        value = await complete(api, prepared, deadline=deadline, arrived=arrived, is_gone=is_gone)
        return json_response(value, headers=headers())
    shortcut: Shortcut[Event] = Shortcut()
    running = _running(api, prepared, deadline=deadline, arrived=arrived, is_gone=is_gone, shortcut=shortcut)
    async with running as events:
        return await sse.stream(
            http_request,
            events,
            chunks=prepared.formatter.chunks,
            last_chunks=prepared.formatter.last_chunks,
            wire=prepared.wire,
            headers=headers,
            note=lambda: moved_note(num_changes()),
            keep_alive_s=api.keep_alive_s,
            shortcut=shortcut,
        )


async def complete(
    api: ApiContext,
    prepared: Prepared,
    *,
    deadline: float | None = None,
    arrived: float,
    is_gone: Callable[[], bool] | None = None,
) -> msgspec.Struct:
    """The response in one piece. Raises what `admit` and `run` raise."""
    async with _running(api, prepared, deadline=deadline, arrived=arrived, is_gone=is_gone) as events:
        return prepared.formatter.whole(await collect(events, prepared.choices))


@contextlib.asynccontextmanager
async def _running(
    api: ApiContext,
    prepared: Prepared,
    *,
    deadline: float | None,
    arrived: float,
    is_gone: Callable[[], bool] | None,
    shortcut: Shortcut[Event] | None = None,
) -> AsyncIterator[AsyncGenerator[Event, None]]:
    choices = prepared.choices
    if prepared.body.user is not None:
        log.info("Request of user %r: %d sequences.", prepared.body.user, len(choices))
    with admit(api, choices, deadline=deadline) as admission:
        events = run(api, choices, admission=admission, arrived=arrived, is_gone=is_gone, shortcut=shortcut)
        async with contextlib.aclosing(events):
            yield events


def json_response(value: msgspec.Struct, *, headers: dict[str, str] | None = None) -> web.Response:
    """Status 200 with this value as JSON."""
    return web.Response(body=msgspec.json.encode(value), content_type="application/json", headers=headers)
