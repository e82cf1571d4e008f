"""The HTTP client of a load, against bytes that a test writes itself."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from support.servers.certificates import make_pair

from cluster.bench.transport import Broken
from cluster.cli.bench.streams import StreamClient
from cluster.cli.client import Client

OK = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


async def read_request(reader: asyncio.StreamReader) -> bytes:
    """Head and body. Raises IncompleteReadError where the client is done."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(
        int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")
    )
    return head + await reader.readexactly(length)


@contextlib.asynccontextmanager
async def client_of(
    handler: Handler,
    *,
    path: str = "",
    silence_s: float = 5.0,
    tls: ssl.SSLContext | None = None,
    ca_cert: Path | None = None,
) -> AsyncIterator[StreamClient]:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            await handler(reader, writer)
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0, ssl=tls)
    async with server:
        scheme = "https" if tls else "http"
        url = f"{scheme}://127.0.0.1:{server.sockets[0].getsockname()[1]}{path}"
        with Client(url, api_key="secret", ca_cert=ca_cert) as client:
            async with StreamClient(client, ca_cert=ca_cert, silence_s=silence_s) as streams:
                yield streams


async def whole(client: StreamClient, body: bytes = b"{}") -> bytes:
    answer = await client.post("/v1/completions", body)
    data = b""
    try:
        while (piece := await answer.chunk()) is not None:
            data += piece[1]
    finally:
        answer.close()
    return data


async def test_the_request_has_key_and_path_and_the_answer_its_pieces_and_times() -> None:
    requests: list[bytes] = []
    first_read = asyncio.Event()

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        requests.append(await read_request(reader))
        writer.write(OK + chunk(b"one"))
        await first_read.wait()
        writer.write(chunk(b"two") + b"0\r\n\r\n")

    async with client_of(handler, path="/base/v1") as client:
        answer = await client.post("/v1/completions", b'{"a": 1}')
        assert (answer.status, answer.headers["content-type"]) == (200, "text/event-stream")
        first = await answer.chunk()
        first_read.set()
        second = await answer.chunk()
        assert first is not None
        assert second is not None
        assert (first[1], second[1]) == (b"one", b"two")
        assert first[0] < second[0]
        assert await answer.chunk() is None
        assert await answer.chunk() is None
    (request,) = requests
    assert request.startswith(b"POST /base/v1/completions HTTP/1.1\r\nHost: 127.0.0.1:")
    assert b"Authorization: Bearer secret\r\n" in request
    assert request.endswith(b'\r\n\r\n{"a": 1}')


async def test_a_connection_is_kept_after_a_whole_answer_only() -> None:
    connections = 0

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        while True:
            await read_request(reader)
            writer.write(OK + chunk(b"x") + b"0\r\n\r\n")

    async with client_of(handler) as client:
        assert [await whole(client) for _ in range(3)] == [b"x"] * 3
        assert connections == 1
        answer = await client.post("/v1/completions", b"{}")
        answer.close()
        assert await whole(client) == b"x"
        assert connections == 2


async def test_a_kept_connection_that_the_server_closed_is_opened_again() -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(OK + chunk(b"x") + b"0\r\n\r\n")  # and closes, without having said so

    async with client_of(handler) as client:
        assert [await whole(client) for _ in range(3)] == [b"x"] * 3


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (OK + chunk(b"x") + b"5\r\nab", "stream broke off"),
        (b"", "connection lost"),
        (b"220 mail.example.com ESMTP\r\n\r\n", "not HTTP"),
    ],
)
async def test_answers_that_are_not_whole(answer: bytes, kind: str) -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(answer)

    async with client_of(handler) as client:
        with pytest.raises(Broken) as e:
            await whole(client)
        assert e.value.kind == kind


async def test_a_silent_server_is_given_up() -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(OK + chunk(b"x"))
        await reader.read()

    async with client_of(handler, silence_s=0.05) as client:
        with pytest.raises(Broken, match=r"timeout: nothing came for 0.05 s"):
            await whole(client)


async def test_an_answer_without_length_ends_with_its_connection() -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.0 200 OK\r\n\r\nall of it")

    async with client_of(handler) as client:
        assert await whole(client) == b"all of it"
        assert await whole(client) == b"all of it"


async def test_https_trusts_the_given_certificate_only(tmp_path: Path) -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(OK + chunk(b"x") + b"0\r\n\r\n")

    cert, key = make_pair(tmp_path, "server")
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(cert, key)
    async with client_of(handler, tls=tls, ca_cert=cert) as client:
        assert await whole(client) == b"x"
    async with client_of(handler, tls=tls) as client:
        with pytest.raises(Broken, match="cannot connect"):
            await whole(client)
