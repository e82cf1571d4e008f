"""From the sequences of one request to its answer, whole or as a stream: what completions and chat have in common.

Knows admission, running and the two forms of an answer; an endpoint's `Wording` says what stands in them. Checks what makes no sense
together in any endpoint.
"""

import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec
from aiohttp import web

from cluster.api.context import Gateway
from cluster.api.generation.generation import Choice, Event, Whole, admit, collect, run
from cluster.api.schemas.base import GenerationRequest
from cluster.api.server import request_options, sse
from workers.errors import RequestError

log = logging.getLogger(__name__)


class Wording(Protocol):
    """How an endpoint words its answer to one request."""

    def whole(self, wholes: Sequence[Whole]) -> msgspec.Struct:
        """The answer in one piece."""

    def chunks(self, event: Event) -> Iterable[msgspec.Struct]:
        """What the stream says about one delta."""

    def last_chunks(self) -> Iterable[msgspec.Struct]:
        """What the stream says before its end."""


def check_shape(gateway: Gateway, body: GenerationRequest, *, num_prompts: int, num_copies: int) -> None:
    """Raises RequestError for a body whose fields contradict each other or ask for too many sequences."""
    if body.stream_options is not None and not body.stream:
        raise RequestError("'stream_options' needs 'stream' to be true.", param="stream_options")
    if body.continuous_usage and not body.include_usage:
        raise RequestError("'continuous_usage_stats' needs 'include_usage' to be true as well.", param="stream_options")
    if not all(body.stop_strings):
        raise RequestError("'stop' must not hold an empty string.", param="stop")
    total, most = num_prompts * num_copies, gateway.max_sequences_per_request
    if total > most:
        raise RequestError(
            f"The request asks for {total} sequences ({num_prompts} prompts times {num_copies}), more than the {most} one request "
            "may have.",
            param="n" if num_prompts <= most else "prompt",
        )


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A request that was checked and encoded: all that running it takes."""

    body: GenerationRequest
    choices: Sequence[Choice]
    wording: Wording


async def answer(
    http_request: web.Request, gateway: Gateway, prepared: Prepared, *, deadline: float | None, arrived: float
) -> web.StreamResponse:
    """Runs the choices and answers. Raises what `admit` and `run` raise, as long as nothing was sent."""

    def headers() -> dict[str, str]:
        return request_options.debug_headers(http_request, prepared.choices)

    def is_gone() -> bool:
        return http_request.transport is None or http_request.transport.is_closing()

    if not prepared.body.stream:
        value = await complete(gateway, prepared, deadline=deadline, arrived=arrived, is_gone=is_gone)
        return json_answer(value, headers=headers())
    async with _running(gateway, prepared, deadline=deadline, arrived=arrived, is_gone=is_gone) as events:
        return await sse.stream(
            http_request,
            events,
            chunks=prepared.wording.chunks,
            last_chunks=prepared.wording.last_chunks,
            headers=headers,
            keep_alive_s=gateway.keep_alive_s,
        )


async def complete(
    gateway: Gateway,
    prepared: Prepared,
    *,
    deadline: float | None = None,
    arrived: float,
    is_gone: Callable[[], bool] | None = None,
) -> msgspec.Struct:
    """The answer in one piece. Raises what `admit` and `run` raise."""
    async with _running(gateway, prepared, deadline=deadline, arrived=arrived, is_gone=is_gone) as events:
        return prepared.wording.whole(await collect(events, prepared.choices))


@contextlib.asynccontextmanager
async def _running(
    gateway: Gateway,
    prepared: Prepared,
    *,
    deadline: float | None,
    arrived: float,
    is_gone: Callable[[], bool] | None,
) -> AsyncIterator[AsyncGenerator[Event, None]]:
    choices = prepared.choices
    if prepared.body.user is not None:
        log.info("Request of user %r: %d sequences.", prepared.body.user, len(choices))
    with admit(gateway, choices, deadline=deadline) as admission:
        events = run(gateway, choices, admission=admission, arrived=arrived, is_gone=is_gone)
        async with contextlib.aclosing(events):
            yield events


def json_answer(value: msgspec.Struct, *, headers: dict[str, str] | None = None) -> web.Response:
    """200 with this value."""
    return web.Response(body=msgspec.json.encode(value), content_type="application/json", headers=headers)
