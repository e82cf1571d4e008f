"""Malformed requests on a socket: each one gets an error response, no log has a traceback, and the server keeps running."""

import asyncio
import contextlib
import gzip
import json
import logging
import socket
from collections.abc import AsyncIterator
from typing import Any

import psutil
import pytest
from support.servers.listening import GET, POST, open_listener

from cluster.api.server.listener import MAX_HEADERS


@contextlib.asynccontextmanager
async def listening(**options: Any) -> AsyncIterator[int]:
    async with open_listener(**options) as listener:
        yield listener.port


async def send(port: int, data: bytes, *, then_eof: bool = False) -> tuple[int, dict[str, str], bytes]:
    """Status, headers in lower case and body of the first response."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        with contextlib.suppress(ConnectionError):
            writer.write(data)
            await writer.drain()
            if then_eof:
                writer.write_eof()
        async with asyncio.timeout(20):
            return await read_response(reader)
    finally:
        writer.close()


async def read_response(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    first, *lines = head.strip().split("\r\n")
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    return int(first.split()[1]), headers, await reader.readexactly(int(headers.get("content-length", 0)))


@pytest.fixture(autouse=True)
def no_traceback(caplog: pytest.LogCaptureFixture) -> Any:
    yield
    for record in caplog.records:
        assert record.exc_info is None and "Traceback" not in record.getMessage() and record.levelno < logging.ERROR, (
            record
        )


BODY = b'{"model": "demo", "prompt": "x", "max_tokens": 2}'


@pytest.mark.parametrize(
    ("data", "status", "code"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100), 400, "malformed_request"),  # TLS on a plain port
        (b"hello\r\n\r\n", 400, "malformed_request"),
        (b"GET\r\n\r\n", 400, "malformed_request"),
        (b"GET /health/live HTTP/9.9\r\nHost: x\r\n\r\n", 400, "malformed_request"),
        (b"GET /\x00 HTTP/1.1\r\nHost: x\r\n\r\n", 400, "malformed_request"),
        (f"{GET}Bad Header: x\r\n\r\n".encode(), 400, "malformed_request"),
        (f"{GET}A: a\x00b\r\n\r\n".encode(), 400, "malformed_request"),
        (f"{POST}Content-Length: x\r\n\r\n".encode(), 400, "malformed_request"),
        (f"{POST}Content-Length: -5\r\n\r\n".encode(), 400, "malformed_request"),
        (f"{POST}Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n".encode(), 400, "malformed_request"),
        (f"{POST}Content-Length: 5\r\nContent-Length: 6\r\n\r\n12345".encode(), 400, "malformed_request"),
        (f"{POST}Transfer-Encoding: chunked\r\n\r\nxyz\r\n\r\n".encode(), 400, None),
        (f"{POST}Content-Encoding: gzip\r\nContent-Length: 5\r\n\r\n12345".encode(), 400, "invalid_body"),
        (f"{POST}Content-Encoding: br\r\nContent-Length: 5\r\n\r\n12345".encode(), 415, "unsupported_media_type"),
        (b"GET /health/live HTTP/2.0\r\nHost: x\r\n\r\n", 400, "malformed_request"),
        (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 431, "headers_too_large"),
        (f"{GET}A: {'a' * 9000}\r\n\r\n".encode(), 431, "headers_too_large"),
        ((GET + "".join(f"A{i}: a\r\n" for i in range(MAX_HEADERS + 9)) + "\r\n").encode(), 400, "malformed_request"),
        ((GET + "".join(f"A{i}: {'a' * 8000}\r\n" for i in range(20))).encode(), 431, "headers_too_large"),
        (f"{GET}Expect: a miracle\r\n\r\n".encode(), 417, "http_error"),
        (b"GET /nowhere HTTP/1.1\r\nHost: x\r\n\r\n", 404, "unknown_url"),
        (b"DELETE /v1/completions HTTP/1.1\r\nHost: x\r\n\r\n", 405, "method_not_allowed"),
        (b"BREW /v1/completions HTTP/1.1\r\nHost: x\r\n\r\n", 400, "malformed_request"),
        (b"OPTIONS /v1/completions HTTP/1.1\r\nHost: x\r\n\r\n", 405, "method_not_allowed"),
        (POST.replace("application/json", "text/plain").encode() + b"Content-Length: 2\r\n\r\n{}", 415, "unsupported_media_type"),
        (POST.replace("application/json", "multipart/form-data").encode() + b"Content-Length: 2\r\n\r\n{}", 415, "unsupported_media_type"),
        (f"{POST}Content-Length: 99999999999\r\n\r\n".encode(), 413, "request_too_large"),
        (f"{POST}Content-Length: 100\r\n\r\n{{".encode(), 408, "request_timeout"),
        (f"{POST}Content-Length: 0\r\n\r\n".encode(), 400, "invalid_json"),
        (GET.encode(), 408, "request_timeout"),
        (b"G", 408, "request_timeout"),
    ],
)  # fmt: skip
async def test_every_malformed_request_gets_an_error_response(data: bytes, status: int, code: str | None) -> None:
    async with listening(head_timeout_s=0.2, body_timeout_s=0.2) as port:
        got, headers, body = await send(port, data)
        error = json.loads(body)["error"]
        assert (got, error["code"]) == (status, code or error["code"]), error
        assert set(error) == {"message", "type", "param", "code"} and error["message"].endswith(".")
        assert "nowhere" not in error["message"] and "/v1" not in error["message"], "no path in errors"
        assert (headers["content-type"], headers["server"]) == ("application/json; charset=utf-8", "tramontane") or (
            headers["content-type"] == "application/json"
        )
        assert headers["x-content-type-options"] == "nosniff"
        assert (await send(port, f"{GET}\r\n".encode()))[0] == 200, "the server must keep running"


async def test_unusual_but_valid_requests() -> None:
    async with listening() as port:
        size = f"Content-Length: {len(BODY)}\r\n\r\n"
        for data in (
            f"{POST}{size}".encode() + BODY,
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\n{size}".encode() + BODY,  # without a content type
            f"{POST}Expect: 100-continue\r\n{size}".encode() + BODY,
            POST.replace("json", "json; charset=utf-8").encode() + size.encode() + BODY,
            f"{POST}Transfer-Encoding: chunked\r\n\r\n{len(BODY):x}\r\n".encode() + BODY + b"\r\n0\r\n\r\n",
            f"{POST}Content-Encoding: identity\r\n{size}".encode() + BODY,
            f"{GET}\r\n".encode(),
        ):
            assert (await send(port, data))[0] in (100, 200), data
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(f"{GET}Connection: close\r\n\r\n".replace("GET", "HEAD").encode())
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200") and not body
        writer.close()


async def test_a_body_that_decompresses_to_too_much_is_refused_and_costs_little() -> None:
    bomb = gzip.compress(bytes(300 * 2**20), compresslevel=1)
    head = f"{POST}Content-Encoding: gzip\r\nContent-Length: {len(bomb)}\r\n\r\n".encode()
    async with listening() as port:
        process = psutil.Process()
        before, peak = process.memory_info().rss, 0

        async def watch() -> None:
            nonlocal peak
            while True:
                peak = max(peak, process.memory_info().rss - before)
                await asyncio.sleep(0.01)

        watching = asyncio.create_task(watch())
        status, _, body = await send(port, head + bomb)
        watching.cancel()
        error = json.loads(body)["error"]
        assert (status, error["code"]) == (413, "request_too_large")
        assert peak < 50 * 2**20, "twice the limit of 8 MiB, and the body itself"


async def test_a_head_is_timed_from_its_first_byte_and_an_idle_connection_is_not() -> None:
    async with listening(head_timeout_s=0.3) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(2):  # idle in between for longer than the timeout of a head
            await asyncio.sleep(0.4)
            writer.write(f"{GET}\r\n".encode())
            assert (await read_response(reader))[0] == 200
        writer.close()
        said, num_sent = await send_slowly(port, GET.encode(), pause_s=0.05)
        assert said.split()[1] == b"408"
        assert num_sent < len(GET), "the connection must be closed before the head has ended"


async def send_slowly(port: int, data: bytes, *, pause_s: float) -> tuple[bytes, int]:
    """Sends byte by byte, never silent, until the other end closes. Returns what it said, and how many bytes were sent.

    A plain socket: what came before a reset can still be read from it.
    """
    loop = asyncio.get_running_loop()
    received, num_sent = bytearray(), 0
    with socket.socket() as sock:
        sock.setblocking(False)
        await loop.sock_connect(sock, ("127.0.0.1", port))

        async def read() -> None:
            with contextlib.suppress(ConnectionError):
                while chunk := await loop.sock_recv(sock, 65536):
                    received.extend(chunk)

        reading = asyncio.create_task(read())
        for byte in data:
            with contextlib.suppress(ConnectionError):
                await loop.sock_sendall(sock, bytes([byte]))
                num_sent += 1
            await asyncio.wait([reading], timeout=pause_s)
            if reading.done():
                break
        async with asyncio.timeout(20):
            await reading
    return bytes(received), num_sent


async def test_idle_connections_are_closed_after_the_timeout() -> None:
    async with listening(idle_timeout_s=0.1) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        async with asyncio.timeout(5):
            assert await reader.read() == b""
        writer.close()


async def test_too_many_connections_close_the_oldest_idle_one_and_never_a_busy_one() -> None:
    async with listening(max_connections=3, body_timeout_s=20) as port:
        streams = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
        busy = streams[0][1]
        busy.write(f"{POST}Content-Length: {len(BODY)}\r\n\r\n".encode() + BODY[:-1])
        await busy.drain()
        assert (await send(port, f"{GET}\r\n".encode()))[0] == 200
        async with asyncio.timeout(5):
            assert await streams[1][0].read() == b"", "the oldest idle connection must be closed"
        busy.write(BODY[-1:])
        assert (await read_response(streams[0][0]))[0] == 200
        for _, writer in streams:
            writer.close()


async def test_no_spelling_of_a_path_bypasses_the_key() -> None:
    async with listening(api_key="secret") as port:
        paths = "/metrics /%6detrics //metrics /static/../metrics /docs/../metrics /./metrics /metrics/ /docs/ /static/ * http://x/metrics"
        for path in paths.split():
            status, _, _ = await send(port, f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            assert status in (400, 401), path
