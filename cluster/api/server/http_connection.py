"""aiohttp's connection with our limits: on the time and size of a request's head, and on the time that a client takes to read.

The only file that uses private parts of aiohttp. Malformed HTTP gets an error response in our format where one is possible, and a log
entry at debug level only. Knows no endpoint.
"""

import asyncio
import logging
import socket
from collections.abc import Callable
from typing import Any, cast

from aiohttp import HttpVersion10, HttpVersion11, hdrs, web
from aiohttp.http import RawRequestMessage, StreamWriter
from aiohttp.http_exceptions import HttpProcessingError, LineTooLong
from aiohttp.streams import EMPTY_PAYLOAD
from aiohttp.web_protocol import _ErrInfo

from cluster.api.server.errors import HTTPError, error_response
from cluster.api.server.origin_guard import harden
from cluster.api.server.tracing import end_trace
from cluster.api.server.write_deadline import CountedTransport, WriteDeadline, num_unacknowledged

log = logging.getLogger(__name__)

MAX_HEAD_BYTES = 64 * 1024
VERSIONS = (HttpVersion10, HttpVersion11)
MAX_BUFFERED_BYTES = 64 * 1024  # of writes that do not wait; asyncio's default for TLS is 512 KiB


class HTTPConnection(web.RequestHandler):
    """One accepted socket, from before its TLS handshake until it is closed. closed: called at the end, if it was opened."""

    __slots__ = (
        "_closed",
        "_head_bytes",
        "_head_timeout_s",
        "_head_timer",
        "_sock",
        "_wire",
        "_write_deadline",
        "opening",
    )

    def __init__(
        self,
        manager: web.Server,
        sock: socket.socket,
        *,
        closed: "Callable[[HTTPConnection], object]",
        head_timeout_s: float,
        write_timeout_s: float,
        **options: Any,
    ) -> None:
        super().__init__(manager, **options)
        self.opening: asyncio.Task[None] | None = None  # with TLS, its handshake
        self._sock = sock
        self._wire: CountedTransport | None = None  # aiohttp forgets it while it still has bytes to send
        self._closed = closed
        self._head_timeout_s = head_timeout_s
        self._head_timer: asyncio.TimerHandle | None = None
        self._head_bytes = 0
        self._write_deadline = WriteDeadline(write_timeout_s)

    @property
    def is_idle(self) -> bool:
        """Whether no request is lost if it is closed: none has arrived, at most a part of its head, and no answer is on its way."""
        if self._wire is None:
            return True
        waits_for_request = self._waiter is not None and not self._waiter.done() and not self._messages
        return waits_for_request and not self._wire.get_write_buffer_size()

    @property
    def is_open(self) -> bool:
        """Whether it has a transport: from the end of the handshake on."""
        return self._wire is not None

    def abort(self) -> None:
        """Closes the connection now, whatever is still to be sent or negotiated."""
        if self._wire is not None:
            self._wire.abort()
        elif self.opening is not None:
            self.opening.cancel()

    def abort_if_late(self, now: float) -> None:
        """Closes the connection if its client does not read; see WriteDeadline. Called several times per period."""
        wire = self._wire
        if wire is None:
            return
        late = self._write_deadline.is_late(
            num_written=wire.num_written,
            num_waiting=wire.get_write_buffer_size() + num_unacknowledged(self._sock),
            closing=wire.is_closing(),
            now=now,
        )
        if late:
            log.debug("Closing a connection: its client does not read.")
            wire.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        wire = self._wire = CountedTransport(cast(asyncio.Transport, transport))
        wire.set_write_buffer_limits(high=MAX_BUFFERED_BYTES)
        super().connection_made(cast(asyncio.Transport, wire))

    def connection_lost(self, exc: BaseException | None) -> None:
        self._forget_head()
        self._closed(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        had_no_request = self._has_no_request
        super().data_received(data)
        self._refuse_versions()
        if not (had_no_request and self._has_no_request) or not data:
            self._forget_head()
            return
        self._head_bytes += len(data)
        if self._head_timer is None:
            self._head_timer = self._loop.call_later(self._head_timeout_s, self._head_is_late)
        if self._head_bytes > MAX_HEAD_BYTES:
            self._refuse(431)

    @property
    def _has_no_request(self) -> bool:
        return self._current_request is None and not self._messages

    def _refuse_versions(self) -> None:
        """aiohttp would serve a request that claims to be HTTP/9.9, and respond as HTTP/9.9, which no client can read."""
        for i, (message, _) in enumerate(self._messages):
            if isinstance(message, RawRequestMessage) and message.version not in VERSIONS:
                error = _ErrInfo(status=400, exc=HttpProcessingError(), message="")
                self._messages[i] = (error, EMPTY_PAYLOAD)

    def _forget_head(self) -> None:
        self._head_bytes = 0
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self._has_no_request:
            self._refuse(408)

    def _refuse(self, status: int) -> None:
        """Sends an error instead of reading the rest of the request."""
        self._forget_head()
        if self._force_close or self._close or self._waiter is None or self._waiter.done():
            return
        self._messages.append((_ErrInfo(status=status, exc=HttpProcessingError(), message=""), EMPTY_PAYLOAD))
        self._waiter.set_result(None)

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """For requests that never reached the application, and for failures outside its middlewares. Always closes the connection."""
        if request.writer.output_size > 0:
            raise ConnectionError("The response has begun; an error can no longer be sent.")
        if isinstance(exc, HttpProcessingError):
            log.debug("A request was malformed: %s.", type(exc).__name__)
            response = error_response(_http_error(431 if isinstance(exc, LineTooLong) else status))
        else:
            response = error_response(
                exc if isinstance(exc, Exception) else HTTPError(status, "The server failed.", code="error")
            )
        harden(response.headers)
        response.force_close()
        return response

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Errors that aiohttp raises before the middlewares, such as for an Expect header, get our format as well."""
        if isinstance(resp, web.HTTPException):
            resp = error_response(resp)
            harden(resp.headers)
        try:
            finished = await super().finish_response(request, resp, start_time)
        finally:
            end_trace(request, resp)
        if _ends_with_the_connection(request, finished[0]):
            finished[0].force_close()
        return finished


class ChunkWriter:
    """Writes parts of a response that has begun without the layers of `response.write`, which cost more than all else about a short event.

    Call `write` where `is_free`: there is a client, and what is unsent is so little that `response.write` would not wait.
    """

    __slots__ = ("_protocol", "_writer")

    def __init__(self, writer: StreamWriter) -> None:
        self._writer = writer
        self._protocol = writer.protocol

    @property
    def is_free(self) -> bool:
        transport = self._protocol.transport
        return transport is not None and self._writer.buffer_size <= MAX_BUFFERED_BYTES and not transport.is_closing()

    def write(self, data: bytes) -> None:
        chunk = b"%x\r\n%b\r\n" % (len(data), data)
        writer, size = self._writer, len(chunk)
        writer.buffer_size += size
        writer.output_size += size
        self._protocol.transport.write(chunk)  # type: ignore[union-attr]  # `is_free` was asked


def chunk_writer(response: web.StreamResponse) -> ChunkWriter | None:
    """None where only `response.write` will do: its headers are not written yet, or it is compressed or not sent in chunks."""
    writer = response._payload_writer
    if not isinstance(writer, StreamWriter) or not writer.chunked or writer._compress is not None:
        return None
    return ChunkWriter(writer) if writer._headers_written else None


def _ends_with_the_connection(request: web.BaseRequest, response: web.StreamResponse) -> bool:
    """HTTP/1.0 has no chunks. So a body without a length ends where the connection ends, even if the client asked to keep it alive."""
    return (
        request.version < HttpVersion11
        and hdrs.CONTENT_LENGTH not in response.headers
        and request.method != hdrs.METH_HEAD
        and response.status not in (204, 304)
    )


def _http_error(status: int) -> HTTPError:
    if status == 408:
        return HTTPError(
            408, "The request's head did not arrive in time.", remedy="Send it faster.", code="request_timeout"
        )
    if status == 431:
        return HTTPError(
            431, "The request line or the headers are too large.", remedy="Shorten them.", code="headers_too_large"
        )
    return HTTPError(status, "The request is malformed.", remedy="Send valid HTTP/1.1.", code="malformed_request")
