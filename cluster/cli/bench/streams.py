"""Streams of one server for a load: HTTP/1.1 over bare sockets, with h11 as the parser, at a quarter of an HTTP library's cost.

Notes when each piece was read off its socket, before anything else happens to it. Keeps connections. Takes its address, key and
certificates from `Client`; follows no redirects, retries nothing and uses no proxy, because all of these would be measured too.
"""

import asyncio
import contextlib
import os
import ssl
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path

import h11
import httpx

from cluster.bench.transport import Broken
from cluster.cli.client import Client
from cluster.system.tls import client_context

SILENCE_S = 120.0  # a load makes servers slow; this says that one is stuck


class StreamClient:
    """One server. Close it, or use it in an `async with` statement."""

    def __init__(self, client: Client, *, ca_cert: Path | None = None, silence_s: float = SILENCE_S) -> None:
        url = httpx.URL(client.url)
        self._host = url.host
        self._port = url.port or (443 if url.scheme == "https" else 80)
        self._tls: ssl.SSLContext | None = client_context(ca_cert) if url.scheme == "https" else None
        self._base = url.path.rstrip("/")
        self._headers = [
            ("Host", url.netloc.decode("ascii")),
            ("Content-Type", "application/json"),
            ("Accept", "text/event-stream, application/json"),
            ("Accept-Encoding", "identity"),
            *client.authorization.items(),
        ]
        self._silence_s = silence_s
        self._idle: list[_Connection] = []

    async def __aenter__(self) -> "StreamClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes what is idle. Idempotent."""
        while self._idle:
            self._idle.pop().close()

    async def post(self, path: str, body: bytes) -> "StreamAnswer":
        """The answer's status and headers. Raises Broken."""
        headers = [*self._headers, ("Content-Length", str(len(body)))]
        request = h11.Request(method="POST", target=self._base + path, headers=headers)
        while True:
            connection = self._idle_connection()
            is_kept = connection is not None
            connection = connection or await self._connect()
            try:
                connection.send(request, body)
                head = await connection.head()
            except BaseException as e:
                connection.close()
                # The server closed a kept connection while it was idle: nobody has seen this request.
                if isinstance(e, Broken) and is_kept and not connection.has_received:
                    continue
                raise
            return StreamAnswer(head, connection, self._idle)

    def _idle_connection(self) -> "_Connection | None":
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open:
                return connection
        return None

    async def _connect(self) -> "_Connection":
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._silence_s):
                _, connection = await loop.create_connection(
                    lambda: _Connection(self._silence_s), self._host, self._port, ssl=self._tls
                )
        except TimeoutError as e:
            raise Broken("cannot connect", f"no connection within {self._silence_s:g} s") from e
        except OSError as e:
            raise Broken("cannot connect", _reason(e)) from e
        return connection


def _reason(error: OSError) -> str:
    """In the system's words: asyncio's own name the call and not the reason."""
    is_system = error.errno is not None and error.errno > 0 and not isinstance(error, ssl.SSLError)
    return os.strerror(error.errno) if is_system and error.errno else error.strerror or str(error)


class StreamAnswer:
    """As in `cluster.bench.transport`. The connection is kept once the body was read to its end."""

    def __init__(self, head: h11.Response, connection: "_Connection", idle: "list[_Connection]") -> None:
        self.status = head.status_code
        self.headers: Mapping[str, str] = {
            name.decode("latin-1").lower(): value.decode("latin-1") for name, value in head.headers
        }
        self._connection: _Connection | None = connection
        self._idle = idle

    async def chunk(self) -> tuple[float, bytes] | None:
        if self._connection is None:
            return None
        try:
            piece = await self._connection.body()
        except Broken:
            self.close()
            raise
        if piece is None:
            if self._connection.reuse():
                self._idle.append(self._connection)
                self._connection = None
            else:
                self.close()
        return piece

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class _Connection(asyncio.Protocol):
    """One connection, with at most one request at a time."""

    def __init__(self, silence_s: float) -> None:
        self.has_received = False  # anything of the current answer
        self._http = h11.Connection(h11.CLIENT)
        self._transport: asyncio.Transport | None = None
        self._pieces: deque[tuple[float, bytes]] = deque()
        self._received_s = 0.0
        self._waiter: asyncio.Future[None] | None = None
        self._lost: str | None = None
        self._is_silent = False
        self._silence_s = silence_s
        self._alarm: asyncio.TimerHandle | None = None
        self._heard_s = 0.0

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        self._heard_s = now
        self.has_received = True
        self._pieces.append((now, data))
        self._wake()

    def eof_received(self) -> None:
        self._lost = self._lost or "the server closed the connection"
        self._pieces.append((time.perf_counter(), b""))
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._lost is None:
            self._lost = str(exc) if exc else "the connection was closed"
        self._wake()

    # What the client calls.

    @property
    def is_open(self) -> bool:
        return self._lost is None and self._transport is not None and not self._transport.is_closing()

    def send(self, request: h11.Request, body: bytes) -> None:
        if self._transport is None:
            raise Broken("connection lost", self._lost or "the connection was closed")
        self.has_received = False
        self._heard_s = time.perf_counter()
        self._watch()
        parts = [self._http.send(event) or b"" for event in (request, h11.Data(data=body), h11.EndOfMessage())]
        self._transport.write(b"".join(parts))

    async def head(self) -> h11.Response:
        """Raises Broken."""
        while True:
            event = await self._event()
            if isinstance(event, h11.Response):
                return event

    async def body(self) -> tuple[float, bytes] | None:
        """A piece of the body and when it was received. Raises Broken."""
        while True:
            event = await self._event()
            if isinstance(event, h11.Data):
                return self._received_s, bytes(event.data)
            if isinstance(event, h11.EndOfMessage):
                return None

    def reuse(self) -> bool:
        """Whether it can carry another request. Call it after the end of an answer."""
        self._unwatch()
        with contextlib.suppress(h11.LocalProtocolError):
            self._http.start_next_cycle()
            return self.is_open
        return False

    def close(self) -> None:
        self._unwatch()
        if self._transport is not None:
            self._transport.abort()

    async def _event(self) -> object:
        while True:
            try:
                event = self._http.next_event()
            except h11.RemoteProtocolError as e:
                if self._lost is not None:
                    raise self._loss() from e
                raise Broken("not HTTP", str(e)) from e
            if event is h11.NEED_DATA:
                await self._feed()
            elif isinstance(event, h11.ConnectionClosed):
                raise self._loss()
            else:
                return event

    async def _feed(self) -> None:
        """Gives the parser the next piece."""
        while not self._pieces:
            if self._lost is not None:
                raise self._loss()
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        self._received_s, data = self._pieces.popleft()
        with contextlib.suppress(h11.RemoteProtocolError):  # `next_event` raises it again
            self._http.receive_data(data)

    def _loss(self) -> Broken:
        kind = "timeout" if self._is_silent else "stream broke off" if self.has_received else "connection lost"
        return Broken(kind, self._lost or "the server closed the connection")

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _watch(self) -> None:
        """One timer for each answer, not one for each piece."""
        self._unwatch()
        left_s = self._heard_s + self._silence_s - time.perf_counter()
        self._alarm = asyncio.get_running_loop().call_later(max(0.01, left_s), self._check)

    def _check(self) -> None:
        if time.perf_counter() - self._heard_s < self._silence_s:
            self._watch()
            return
        self._is_silent = True
        self._lost = f"nothing came for {self._silence_s:g} s"
        self.close()
        self._wake()

    def _unwatch(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
