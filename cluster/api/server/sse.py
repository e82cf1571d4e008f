"""Server-sent events in OpenAI's format: `data: JSON`, a blank line, and `data: [DONE]` at the end; or as another `Wire` has it.

Knows the wire format. The headers are sent with the first event, so that a failure before it has its own status. A stream that is silent
for `keep_alive_s`, while it waits for admission or for another replica, gets a comment, which clients skip. If the comment comes before
the first event, the headers are sent with it, and later errors are sent as events.
"""

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
from aiohttp import hdrs, web

from cluster.api.server.errors import ClientGoneError, ErrorEnvelope, describe
from cluster.api.server.http_connection import ChunkWriter, chunk_writer
from cluster.api.server.shortcut import Shortcut

log = logging.getLogger(__name__)

_HEADERS = {
    hdrs.CONTENT_TYPE: "text/event-stream; charset=utf-8",
    hdrs.CACHE_CONTROL: "no-cache",
    "X-Accel-Buffering": "no",  # without it, nginx would buffer the stream
}
KEEP_ALIVE_S = 15.0  # proxies usually give up after 30 or 60 s
_encoder = msgspec.json.Encoder()


def encode_event(value: msgspec.Struct) -> bytes:
    """One event's bytes."""
    return b"data: " + _encoder.encode(value) + b"\n\n"


def encode_named(value: msgspec.Struct) -> bytes:
    """One event's bytes with its name, which is its struct's tag."""
    name: str = value.__struct_config__.tag  # type: ignore[assignment]  # the structs of named events have texts as tags
    return b"event: " + name.encode() + b"\n" + encode_event(value)


def _encode_error(error: Exception) -> bytes:
    return encode_event(ErrorEnvelope(error=describe(error)[1]))


@dataclass(frozen=True)
class Wire:
    """How a stream is written: each event, a failure after the headers, and the end."""

    encode: Callable[[msgspec.Struct], bytes] = encode_event
    error: Callable[[Exception], bytes] = _encode_error
    end: bytes = b"data: [DONE]\n\n"


CHUNKS = Wire()


class TextEvents:
    """Events in OpenAI's format that differ in one text, and in the usage where they have it: what is around these is encoded once.
    Most events of most streams are such.

    make: the event of a text and a usage, in that order in its JSON. usage: that of now; None where events have none.
    """

    def __init__(
        self, make: Callable[[str, Any], msgspec.Struct], usage: Callable[[], msgspec.Struct] | None = None
    ) -> None:
        text, used = (
            secrets.token_hex(16),
            _encoder.encode(secrets.token_hex(16)),
        )  # nothing else in the event is the same
        whole = encode_event(make(text, None if usage is None else msgspec.Raw(used)))
        self._before, self._after = whole.split(_encoder.encode(text))
        self._usage = usage
        if usage is not None:
            self._between, self._after = self._after.split(used)

    def encode(self, text: str) -> bytes:
        """The same bytes as `encode_event` gives."""
        if self._usage is None:
            return b"%b%b%b" % (self._before, _encoder.encode(text), self._after)
        usage = _encoder.encode(self._usage())
        return b"%b%b%b%b%b" % (self._before, _encoder.encode(text), self._between, usage, self._after)


def encode_comment(text: str) -> bytes:
    """The bytes of a comment, which clients skip."""
    return f": {text}\n\n".encode()


T = TypeVar("T")


async def stream(
    request: web.Request,
    events: AsyncGenerator[T, None],
    *,
    chunks: Callable[[T], Iterable[msgspec.Struct | bytes]],
    last_chunks: Callable[[], Iterable[msgspec.Struct]] = tuple,
    wire: Wire = CHUNKS,
    headers: Callable[[], Mapping[str, str]] = dict,
    note: Callable[[], str] = str,
    keep_alive_s: float = KEEP_ALIVE_S,
    shortcut: Shortcut[T] | None = None,
) -> web.StreamResponse:
    """Writes the chunks of every event, then the last chunks, then the wire's end. Chunks that are bytes are encoded already.
    headers: called when they are sent. note: called for every event of `events`; what it returns becomes a comment before the event,
    unless it is empty. shortcut: opened for who makes the events; the first one, and those with a note, do not come that way.

    A failure before the headers is raised. A later one is sent as an error event, and the stream ends without that end.
    """
    writer = _Writer(request, headers)

    def encoded(event: T) -> bytes:
        return b"".join([chunk if isinstance(chunk, bytes) else wire.encode(chunk) for chunk in chunks(event)])

    shortcut = shortcut or Shortcut()
    shortcut.open(is_free=writer.is_free, write=lambda event: writer.send_now(encoded(event)))
    try:
        async with _kept_alive(writer, keep_alive_s):
            async for event in events:
                data = encoded(event)
                await writer.send(encode_comment(text) + data if (text := note()) else data)
            await writer.send(b"".join([wire.encode(chunk) for chunk in last_chunks()]) + wire.end)
        await writer.response.write_eof()
    except (ConnectionError, ClientGoneError):
        if not writer.started:
            raise
        log.debug("A client of %s disconnected in mid-stream.", request.path)
    except Exception as e:
        if not writer.started:
            raise
        shortcut.close()
        try:
            await writer.send(wire.error(e))
            await writer.response.write_eof()
        except (ConnectionError, ClientGoneError):
            log.debug("A client of %s disconnected before the error could be sent.", request.path)
    finally:
        shortcut.close()
    return writer.response


class _Writer:
    """Starts the response with the first bytes. Several tasks may send; the bytes of one call stay together."""

    def __init__(self, request: web.Request, headers: Callable[[], Mapping[str, str]]) -> None:
        self.response = web.StreamResponse(headers=_HEADERS)
        self.started = False
        self.last_sent = time.monotonic()
        self._request = request
        self._headers = headers
        self._lock = asyncio.Lock()
        self._chunks: ChunkWriter | None = None  # once it has begun, if it is sent in chunks

    def is_free(self) -> bool:
        """Whether `send` would write at once."""
        return self._chunks is not None and not self._lock.locked() and self._chunks.is_free

    def send_now(self, data: bytes) -> None:
        """As `send`, where `is_free`."""
        if data:
            assert self._chunks is not None
            self._chunks.write(data)
            self.last_sent = time.monotonic()

    async def send(self, data: bytes) -> None:
        """Waits for a client that reads slowly; the listener closes the connection of one that is too slow."""
        # The usual case, at a tenth of the cost of what follows.
        if self.is_free():
            self.send_now(data)
            return
        async with self._lock:
            if not self.started:
                self.started = True
                self.response.headers.update(self._headers())
                await self.response.prepare(self._request)
            if data:
                self.last_sent = time.monotonic()
                await self.response.write(data)
                if self._chunks is None:
                    self._chunks = chunk_writer(self.response)


@contextlib.asynccontextmanager
async def _kept_alive(writer: _Writer, keep_alive_s: float) -> AsyncIterator[None]:
    async def comment_when_silent() -> None:
        with contextlib.suppress(ConnectionError, ClientGoneError):  # the task that writes events gets it as well
            while True:
                silent_s = time.monotonic() - writer.last_sent
                if silent_s >= keep_alive_s:
                    await writer.send(encode_comment("keep-alive"))
                else:
                    await asyncio.sleep(keep_alive_s - silent_s)

    task = asyncio.create_task(comment_when_silent(), name="keep-alive")
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
