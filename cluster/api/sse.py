"""Server-sent events as OpenAI sends them: `data: JSON`, a blank line, and `data: [DONE]` at the end.

Knows the wire and one writer. Headers go out with the first event, not before, so that what fails until then has its own status.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Iterable

import msgspec
from aiohttp import hdrs, web

from cluster.api.errors import ClientGoneError, ErrorEnvelope, describe
from cluster.api.generation import Event

log = logging.getLogger(__name__)

_HEADERS = {
    hdrs.CONTENT_TYPE: "text/event-stream; charset=utf-8",
    hdrs.CACHE_CONTROL: "no-cache",
    "X-Accel-Buffering": "no",  # nginx would otherwise collect the stream
}
WRITE_TIMEOUT_S = 60.0
_encoder = msgspec.json.Encoder()


def encode_event(value: msgspec.Struct) -> bytes:
    """One event's bytes."""
    return b"data: " + _encoder.encode(value) + b"\n\n"


async def stream(
    request: web.Request,
    events: AsyncGenerator[Event, None],
    *,
    chunks: Callable[[Event], Iterable[msgspec.Struct]],
    last_chunks: Callable[[], Iterable[msgspec.Struct]],
) -> web.StreamResponse:
    """Writes every event's chunks, then the last ones, then [DONE].

    A failure before the first event is raised; a later one becomes an error event, and the stream ends without [DONE].
    """
    event = await anext(events)
    response = web.StreamResponse(headers=_HEADERS)
    try:
        await response.prepare(request)
        while event is not None:
            data = b"".join([encode_event(chunk) for chunk in chunks(event)])
            if data:
                await _write(request, response, data)
            event = await anext(events, None)  # type: ignore[arg-type]
        last = b"".join([encode_event(chunk) for chunk in last_chunks()])
        await _write(request, response, last + b"data: [DONE]\n\n")
        await response.write_eof()
    except (ConnectionError, ClientGoneError):
        log.debug("The client of %s left in mid-stream.", request.path)
    except Exception as e:
        _, body = describe(e)
        try:
            await response.write(encode_event(ErrorEnvelope(error=body)))
            await response.write_eof()
        except ConnectionError:
            log.debug("The client of %s left before it could be told of an error.", request.path)
    return response


async def _write(request: web.Request, response: web.StreamResponse, data: bytes) -> None:
    """Raises ClientGoneError for a client that keeps its connection open but reads nothing."""
    try:
        async with asyncio.timeout(WRITE_TIMEOUT_S):
            await response.write(data)
    except TimeoutError as e:
        if request.transport is not None:
            request.transport.abort()
        raise ClientGoneError(f"The client has read nothing for {WRITE_TIMEOUT_S:g} s.") from e
