"""Runs the HTTP application on a port, and stops it in order: first no new connections, then no connections. Knows no endpoint.

Bounds what connections may cost, below the application: their number, file descriptors, and the time of a TLS handshake, of a request's
head and of reading an answer. A connection counts from the moment it is accepted.
"""

import asyncio
import contextlib
import logging
import socket
import ssl
from typing import Any, Self

from aiohttp import web

from cluster.api.server.acceptor import Acceptor, RareWarning
from cluster.api.server.http_connection import HTTPConnection
from cluster.system.descriptors import raise_limit

log = logging.getLogger(__name__)

SHUTDOWN_TIMEOUT_S = 0.5  # draining has waited already; aiohttp waits this long twice, then cancels handlers
BACKLOG = 1024
HEAD_TIMEOUT_S = 30.0  # for a TLS handshake, and again for a request's head
WRITE_TIMEOUT_S = 60.0
IDLE_TIMEOUT_S = 75.0  # between requests; longer than proxies usually keep connections open
MAX_LINE_BYTES = 8190
MAX_HEADERS = 100
MAX_CONNECTIONS = 16_384
MAX_UNSENT_BYTES = 128 * 1024
_TCP_NOTSENT_LOWAT = 25  # on Linux; Python's socket module does not define it
_SPARE_FILES = 256  # for everything else that the process opens; a quarter of a low limit
_POLLS_PER_TIMEOUT = 8  # of writes
_MAX_TURNS_TO_CLOSE = 10
_POLLED_AT_ONCE = 256  # connections, about half a millisecond


class Listener:
    """`await Listener(app).open(host, port)`, later `stop_accepting` and `close`, both idempotent. tls: serve HTTPS.

    write_timeout_s: a client that has not read enough for so long loses its connection, see WriteDeadline.
    """

    def __init__(
        self,
        app: web.Application,
        *,
        tls: ssl.SSLContext | None = None,
        head_timeout_s: float = HEAD_TIMEOUT_S,
        idle_timeout_s: float = IDLE_TIMEOUT_S,
        write_timeout_s: float = WRITE_TIMEOUT_S,
        max_connections: int = MAX_CONNECTIONS,
    ) -> None:
        # handler_cancellation: a request ends at once if its client disconnects.
        self._runner = web.AppRunner(
            app, handler_cancellation=True, access_log=None, shutdown_timeout=SHUTDOWN_TIMEOUT_S
        )
        self._tls_options: dict[str, Any] = (
            {}
            if tls is None
            else {"ssl": tls, "ssl_handshake_timeout": head_timeout_s, "ssl_shutdown_timeout": write_timeout_s}
        )
        self._head_timeout_s = head_timeout_s
        self._idle_timeout_s = idle_timeout_s
        self._write_timeout_s = write_timeout_s
        self._connections: dict[HTTPConnection, None] = {}  # oldest first
        self._max_connections = max_connections
        self._max_descriptor = 0  # sockets with a higher number are in the reserve
        self._num_affordable = max_connections  # less while descriptors are scarce
        self._acceptor: Acceptor | None = None
        self._poll: asyncio.Task[None] | None = None
        self._warning = RareWarning()
        self.port = 0

    async def open(self, host: str, port: int, *, shared: bool = False) -> Self:
        """Port 0 picks a free port; see `port`. shared: other gateways on this host may listen on the same port. Raises OSError."""
        await self._runner.setup()
        limit = raise_limit(MAX_CONNECTIONS + _SPARE_FILES)
        self._max_descriptor = limit - min(_SPARE_FILES, limit // 4)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        sock = socket.create_server((host, port), family=family, backlog=BACKLOG, reuse_port=shared)
        # Inherited by connections. By default the kernel would buffer megabytes for each client that does not read.
        sock.setsockopt(socket.IPPROTO_TCP, _TCP_NOTSENT_LOWAT, MAX_UNSENT_BYTES)
        self.port = sock.getsockname()[1]
        self._acceptor = Acceptor(sock, self._serve)
        self._acceptor.start()
        self._poll = asyncio.create_task(self._poll_writes(), name="poll writes")
        return self

    def num_connections(self) -> int:
        """All that were accepted and are not closed, TLS handshakes among them."""
        return len(self._connections)

    async def stop_accepting(self) -> None:
        """Refuses new connections; open ones continue."""
        acceptor, self._acceptor = self._acceptor, None
        if acceptor is not None:
            acceptor.close()
            await asyncio.sleep(0)  # connections accepted just now still get their handler

    async def close(self) -> None:
        """Gives responses a moment to finish, then closes every connection."""
        await self.stop_accepting()
        poll, self._poll = self._poll, None
        if poll is not None:
            poll.cancel()
        for connection in [c for c in self._connections if not c.is_open]:
            connection.abort()
        await self._runner.cleanup()
        for connection in list(self._connections):
            connection.abort()
        for _ in range(_MAX_TURNS_TO_CLOSE):  # asyncio closes the sockets of aborted connections a few turns later
            if self._connections:
                await asyncio.sleep(0)

    def _serve(self, sock: socket.socket) -> bool:
        """If there are too many connections, closes the oldest idle one, or the new one if none is idle."""
        if sock.fileno() > self._max_descriptor:
            self._num_affordable = min(self._num_affordable, max(len(self._connections), 1))
        is_full = len(self._connections) >= self._num_affordable
        if is_full:
            victim = next((c for c in self._connections if c.is_idle), None)
            self._warning.log(
                "There are too many connections (%d). Raise the limit on open files (ulimit -n) if it is low. %s.",
                len(self._connections),
                "The new one is closed" if victim is None else "The oldest idle one is closed",
            )
            if victim is None:
                sock.close()
                return True
            self._forget(victim)
            victim.abort()
        connection = self._make_connection(sock)
        self._connections[connection] = None

        def opened(_: asyncio.Task[None]) -> None:
            if not connection.is_open:
                self._forget(connection)
                sock.close()

        connection.opening = asyncio.create_task(self._open_connection(connection, sock), name="open connection")
        connection.opening.add_done_callback(opened)  # called even if the task is cancelled before it runs
        return not is_full  # the descriptor of a connection that made room is free in the next turn

    async def _open_connection(self, connection: HTTPConnection, sock: socket.socket) -> None:
        """Until the TLS handshake has ended, or failed for whatever reason."""
        with contextlib.suppress(OSError):  # among them ssl.SSLError and the timeout
            await asyncio.get_running_loop().connect_accepted_socket(lambda: connection, sock, **self._tls_options)

    def _make_connection(self, sock: socket.socket) -> HTTPConnection:
        assert self._runner.server is not None
        return HTTPConnection(
            self._runner.server,
            sock,
            closed=self._forget,
            head_timeout_s=self._head_timeout_s,
            write_timeout_s=self._write_timeout_s,
            loop=asyncio.get_running_loop(),
            access_log=None,
            keepalive_timeout=self._idle_timeout_s,
            max_line_size=MAX_LINE_BYTES,
            max_field_size=MAX_LINE_BYTES,
            max_headers=MAX_HEADERS,
            auto_decompress=False,  # aiohttp would decompress on the event loop, for any client; see content_coding.py
        )

    def _forget(self, connection: HTTPConnection) -> None:
        self._connections.pop(connection, None)
        if len(self._connections) < self._num_affordable // 2:
            self._num_affordable = self._max_connections
        if self._acceptor is not None:
            self._acceptor.retry_soon()

    async def _poll_writes(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(self._write_timeout_s / _POLLS_PER_TIMEOUT)
            for i, connection in enumerate(list(self._connections)):
                if i % _POLLED_AT_ONCE == _POLLED_AT_ONCE - 1:
                    await asyncio.sleep(0)
                connection.abort_if_late(loop.time())
