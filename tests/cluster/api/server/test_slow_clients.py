"""Clients that do not read, or do not finish a TLS handshake, lose their connection, whatever the form of the answer. Real sockets."""

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from support.fakes.replica import FakeReplica
from support.servers.certificates import make_pair
from support.servers.listening import GET, deaf_client, open_listener, post, until

from cluster.api.server.listener import Listener
from cluster.system.tls import Certificate
from workers.protocol import GenerateRequest, TokenDelta

TIMEOUT_S = 0.8
PAGE = b"GET /static/playground.js HTTP/1.1\r\nHost: x\r\n\r\n"


class Endless(FakeReplica):
    """Streams without an end. num_open: streams that are open."""

    async def generate(
        self, request: GenerateRequest, *, take: Callable[[TokenDelta], bool] | None = None
    ) -> AsyncIterator[TokenDelta]:
        self.num_open += 1
        try:
            while True:
                await asyncio.sleep(0)
                delta = TokenDelta(request_id=request.request_id, token_ids=[300], num_cached_tokens=0)
                if take is None or not take(delta):
                    yield delta
        finally:
            self.num_open -= 1
            self.closed.set()


FORMS = {
    "stream": post("/v1/completions", {"model": "demo", "prompt": "x", "stream": True}),
    "whole answer": post("/tokenize", {"model": "demo", "prompt": "a b c " * 100_000}),
    "page": PAGE,
    "page, connection closes": PAGE.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"),
    "page, HTTP/1.0": PAGE.replace(b"HTTP/1.1", b"HTTP/1.0"),
    "pages, pipelined": PAGE * 20,
    "metrics": b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 20,
    "description": b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 3,
    "errors": b"GET /nowhere HTTP/1.1\r\nHost: x\r\n\r\n" * 300,
}
# Small enough for the kernel, which goes on sending without the process.
CLOSING = ("page, connection closes", "page, HTTP/1.0")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return Certificate(*make_pair(tmp_path_factory.mktemp("tls"), "server"))


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "TLS"])
@pytest.mark.parametrize("form", FORMS)
async def test_an_answer_that_is_not_read_ends_after_the_deadline(form: str, tls: bool, certificate: Any) -> None:
    replica = Endless()
    context = certificate.context if tls else None
    async with open_listener(replica, tls=context, write_timeout_s=TIMEOUT_S, idle_timeout_s=60) as listener:
        began = time.monotonic()
        clients = [await deaf_client(listener.port, FORMS[form], tls=tls) for _ in range(3)]
        await until(lambda: listener.num_connections() == 0)
        if form not in CLOSING:
            assert time.monotonic() - began > TIMEOUT_S * 0.9, "it must have its time"
        await until(lambda: replica.num_open == 0)
        for client in clients:
            client.close()


@pytest.mark.parametrize("form", ["stream", "whole answer", "page"])
async def test_a_client_that_reads_a_few_bytes_at_a_time_is_not_better_off(form: str) -> None:
    async with open_listener(Endless(), write_timeout_s=TIMEOUT_S, idle_timeout_s=60) as listener:
        client = await deaf_client(listener.port, FORMS[form])
        client.setblocking(False)
        async with asyncio.timeout(20):
            while listener.num_connections():
                with contextlib.suppress(OSError):
                    client.recv(20)
                await asyncio.sleep(0.05)
        client.close()


async def test_a_slow_client_that_goes_on_reading_gets_everything() -> None:
    async with open_listener(write_timeout_s=TIMEOUT_S) as listener:
        request = FORMS["whole answer"].replace(b"Host: x", b"Host: x\r\nConnection: close")
        client = await deaf_client(listener.port, request, buffer_bytes=64 * 1024)
        began, received = time.monotonic(), bytearray()
        while chunk := await asyncio.to_thread(client.recv, 8192):
            received += chunk
            # Much longer than the deadline in all.
            if time.monotonic() - began < 2.5 * TIMEOUT_S:
                await asyncio.sleep(0.02)
        head, _, body = bytes(received).partition(b"\r\n\r\n")
        assert time.monotonic() - began > 2 * TIMEOUT_S
        assert f"Content-Length: {len(body)}".encode() in head
        client.close()


async def test_an_idle_connection_whose_answer_was_read_stays() -> None:
    async with open_listener(write_timeout_s=0.2, idle_timeout_s=60) as listener:
        client = await deaf_client(listener.port, f"{GET}\r\n".encode())
        for _ in range(2):
            assert (await asyncio.to_thread(client.recv, 65536)).startswith(b"HTTP/1.1 200")
            await asyncio.sleep(0.6)
            await asyncio.to_thread(client.sendall, f"{GET}\r\n".encode())
        client.close()


@pytest.mark.parametrize(
    "sent", [b"", b"\x16", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"GET / HTTP/1.1\r\n\r\n"]
)
async def test_a_tls_handshake_that_does_not_end_counts_and_ends_after_the_deadline(
    sent: bytes, certificate: Any
) -> None:
    async with open_listener(tls=certificate.context, head_timeout_s=1.0) as listener:
        clients = await asyncio.gather(*(deaf_client(listener.port, sent) for _ in range(20)))
        if not sent.startswith(b"GET"):  # which is refused at once
            await until(lambda: listener.num_connections() > 0)
        await until(lambda: listener.num_connections() == 0)
        for client in clients:
            client.settimeout(30)
            with contextlib.suppress(ConnectionError):
                while client.recv(1000):  # an alert, perhaps
                    pass
            client.close()


async def test_handshakes_count_in_the_limit_and_the_oldest_one_makes_room(certificate: Any) -> None:
    async with open_listener(tls=certificate.context, max_connections=3, head_timeout_s=60) as listener:
        clients = [await deaf_client(listener.port, b"") for _ in range(4)]
        clients[0].settimeout(30)
        assert await asyncio.to_thread(clients[0].recv, 1) == b"", "the oldest must be closed"
        assert listener.num_connections() == 3
        client = await deaf_client(listener.port, f"{GET}\r\n".encode(), tls=True)
        assert (await asyncio.to_thread(client.recv, 65536)).startswith(b"HTTP/1.1 200")
        for sock in (*clients, client):
            sock.close()


async def test_closing_the_listener_ends_every_connection(certificate: Any) -> None:
    async with open_listener(Endless(), tls=certificate.context) as listener:
        clients: list[socket.socket] = [
            await deaf_client(listener.port, b""),
            await deaf_client(listener.port, FORMS["stream"], tls=True),
        ]
        await until(lambda: listener.num_connections() == 2)
        await listener.close()
        assert listener.num_connections() == 0
        for client in clients:
            client.close()


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "TLS"])
async def test_a_file_is_sent_through_the_counted_transport(tls: bool, certificate: Any, tmp_path: Path) -> None:
    """`sendfile` would write past it: the contents of a batch's file must arrive, and a client that does not read them is cut off."""
    contents = bytes(range(256)) * 40_000
    (tmp_path / "file").write_bytes(contents)

    async def send(request: web.Request) -> web.FileResponse:
        return web.FileResponse(tmp_path / "file")

    app = web.Application()
    app.router.add_get("/file", send)
    listener = Listener(app, tls=certificate.context if tls else None, write_timeout_s=TIMEOUT_S)
    await listener.open("127.0.0.1", 0)
    try:
        request = b"GET /file HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        client = await deaf_client(listener.port, request, tls=tls, buffer_bytes=1 << 20)
        received = bytearray()
        while chunk := await asyncio.to_thread(client.recv, 1 << 20):
            received += chunk
        client.close()
        assert bytes(received).endswith(contents)
        deaf = await deaf_client(listener.port, request, tls=tls)
        await until(lambda: listener.num_connections() == 0)
        deaf.close()
    finally:
        await listener.close()
