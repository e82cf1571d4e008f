"""The real listener and application over a fake replica, in this process, and clients that read nothing or little."""

import asyncio
import contextlib
import json
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from typing import Any

from cluster.api.app import make_app
from cluster.api.server.listener import Listener
from cluster.router.router import Router
from cluster.text.tokenizer import load_tokenizer
from support.fakes.replica import FakeReplica
from support.paths import DEMO_MODEL

TOKENIZER = load_tokenizer(DEMO_MODEL)
POST = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
GET = "GET /health/live HTTP/1.1\r\nHost: x\r\n"


@contextlib.asynccontextmanager
async def open_listener(
    replica: Any = None,
    *,
    tls: ssl.SSLContext | None = None,
    head_timeout_s: float = 5.0,
    idle_timeout_s: float = 5.0,
    write_timeout_s: float = 5.0,
    max_connections: int = 100,
    **options: Any,
) -> AsyncIterator[Listener]:
    """It listens on loopback, on a free port. options: of make_app."""
    router = Router([FakeReplica() if replica is None else replica])
    app = make_app(router=router, tokenizer=TOKENIZER, chat_template=None, model_name="demo", **options)
    listener = Listener(
        app,
        tls=tls,
        head_timeout_s=head_timeout_s,
        idle_timeout_s=idle_timeout_s,
        write_timeout_s=write_timeout_s,
        max_connections=max_connections,
    )
    await listener.open("127.0.0.1", 0)
    try:
        yield listener
    finally:
        await listener.close()


async def deaf_client(port: int, data: bytes, *, tls: bool = False, buffer_bytes: int = 4096) -> socket.socket:
    """Sends `data` over a connection with a small buffer, and leaves reading to the caller."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
    await asyncio.to_thread(sock.connect, ("127.0.0.1", port))
    if tls:
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        sock = await asyncio.to_thread(context.wrap_socket, sock)
    await asyncio.to_thread(sock.sendall, data)
    return sock


async def until(condition: Callable[[], bool], *, timeout_s: float = 20.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)


def post(path: str, body: dict[str, Any], *, version: str = "HTTP/1.1", headers: str = "") -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} {version}\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n"
    return f"{head}{headers}\r\n".encode() + data
