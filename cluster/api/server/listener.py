"""Runs the HTTP application on a port, and stops it in order: first no new connections, then no connections. Knows no endpoint.

Bounds what connections may cost, below the application: their number, and the time and size of a request's head. Malformed HTTP gets an
error response where one is possible, and a log entry at debug level only.
"""

import asyncio
import contextlib
import logging
import resource
import socket
import ssl
from collections.abc import Callable
from typing import Any, Self

from aiohttp import HttpVersion10, HttpVersion11, web
from aiohttp.http import RawRequestMessage
from aiohttp.http_exceptions import HttpProcessingError, LineTooLong
from aiohttp.streams import EMPTY_PAYLOAD
from aiohttp.web_protocol import _ErrInfo

from cluster.api.server.errors import HTTPError, error_response
from cluster.api.server.origin_guard import harden

log = logging.getLogger(__name__)

SHUTDOWN_TIMEOUT_S = 0.5  # draining has waited already; aiohttp waits this long twice, then cancels handlers
BACKLOG = 1024
MAX_ACCEPTS = 64
HEAD_TIMEOUT_S = 30.0
IDLE_TIMEOUT_S = 75.0  # between requests; longer than proxies usually keep connections open
MAX_LINE_BYTES = 8190
MAX_HEADERS = 100
MAX_HEAD_BYTES = 64 * 1024
MAX_CONNECTIONS = 16_384
VERSIONS = (HttpVersion10, HttpVersion11)
MAX_UNSENT_BYTES = 128 * 1024
_TCP_NOTSENT_LOWAT = 25  # on Linux; Python's socket module does not define it
_SPARE_FILES = 256  # for everything else that the process opens


class Listener:
    """`await Listener(app).open(host, port)`, later `stop_accepting` and `close`, both idempotent. tls: serve HTTPS."""

    def __init__(
        self,
        app: web.Application,
        *,
        tls: ssl.SSLContext | None = None,
        head_timeout_s: float = HEAD_TIMEOUT_S,
        idle_timeout_s: float = IDLE_TIMEOUT_S,
        max_connections: int | None = None,
    ) -> None:
        # handler_cancellation: a request ends at once if its client disconnects.
        self._runner = web.AppRunner(
            app, handler_cancellation=True, access_log=None, shutdown_timeout=SHUTDOWN_TIMEOUT_S
        )
        self._tls = tls
        self._head_timeout_s = head_timeout_s
        self._idle_timeout_s = idle_timeout_s
        self._connections: dict[_Connection, None] = {}  # oldest first
        self._max_connections = max_connections
        self._server: asyncio.Server | None = None
        self.port = 0

    async def open(self, host: str, port: int, *, shared: bool = False) -> Self:
        """Port 0 picks a free port; see `port`. shared: other gateways on this host may listen on the same port. Raises OSError."""
        await self._runner.setup()
        if self._max_connections is None:
            self._max_connections = min(MAX_CONNECTIONS, max(_raise_file_limit() - _SPARE_FILES, 64))
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        sock = socket.create_server((host, port), family=family, backlog=BACKLOG, reuse_port=shared)
        # Inherited by connections. By default the kernel would buffer megabytes for each client that does not read.
        sock.setsockopt(socket.IPPROTO_TCP, _TCP_NOTSENT_LOWAT, MAX_UNSENT_BYTES)
        self.port = sock.getsockname()[1]
        loop = asyncio.get_running_loop()
        # asyncio accepts up to `backlog` connections at once; a thousand requests in one turn of the event loop would delay every stream.
        self._server = await loop.create_server(self._make_connection, sock=sock, ssl=self._tls, backlog=MAX_ACCEPTS)
        sock.listen(BACKLOG)
        return self

    def _make_connection(self) -> "_Connection":
        assert self._runner.server is not None
        return _Connection(
            self._runner.server,
            opened=self._opened,
            closed=lambda connection: self._connections.pop(connection, None),
            head_timeout_s=self._head_timeout_s,
            loop=asyncio.get_running_loop(),
            access_log=None,
            keepalive_timeout=self._idle_timeout_s,
            max_line_size=MAX_LINE_BYTES,
            max_field_size=MAX_LINE_BYTES,
            max_headers=MAX_HEADERS,
            auto_decompress=False,  # aiohttp would decompress on the event loop, for any client; see origin_guard.py
        )

    def _opened(self, connection: "_Connection") -> None:
        """If there are too many connections, closes the oldest idle one, or the new one if none is idle."""
        self._connections[connection] = None
        assert self._max_connections is not None
        if len(self._connections) > self._max_connections:
            victim = next((c for c in self._connections if c.is_idle), connection)
            self._connections.pop(victim)
            victim.force_close()

    async def stop_accepting(self) -> None:
        """Refuses new connections; open ones continue."""
        server, self._server = self._server, None
        if server is not None:
            server.close()
            await asyncio.sleep(0)  # connections accepted just now still get their handler

    async def close(self) -> None:
        """Gives responses a moment to finish, then closes every connection."""
        await self.stop_accepting()
        await self._runner.cleanup()


class _Connection(web.RequestHandler):
    """aiohttp's connection, with limits on the time and size of a request's head, and our error format for what it cannot parse."""

    __slots__ = ("_closed", "_head_bytes", "_head_timeout_s", "_head_timer", "_opened")

    def __init__(
        self,
        manager: web.Server,
        *,
        opened: "Callable[[_Connection], None]",
        closed: "Callable[[_Connection], object]",
        head_timeout_s: float,
        **options: Any,
    ) -> None:
        super().__init__(manager, **options)
        self._opened = opened
        self._closed = closed
        self._head_timeout_s = head_timeout_s
        self._head_timer: asyncio.TimerHandle | None = None
        self._head_bytes = 0

    @property
    def is_idle(self) -> bool:
        """Whether no request has arrived, at most a part of its head."""
        return self._current_request is None and not self._messages

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._opened(self)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._forget_head()
        self._closed(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        was_idle = self.is_idle
        super().data_received(data)
        self._refuse_versions()
        if not (was_idle and self.is_idle) or not data:
            self._forget_head()
            return
        self._head_bytes += len(data)
        if self._head_timer is None:
            self._head_timer = self._loop.call_later(self._head_timeout_s, self._head_is_late)
        if self._head_bytes > MAX_HEAD_BYTES:
            self._refuse(431)

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
        if self.is_idle:
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
        return await super().finish_response(request, resp, start_time)


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


def _raise_file_limit() -> int:
    """Raises the limit on open files, since each connection is one, as far as the system allows. Returns the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_CONNECTIONS + _SPARE_FILES
    wanted = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            return wanted
    return wanted if soft == resource.RLIM_INFINITY else soft
