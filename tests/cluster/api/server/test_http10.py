"""Where an answer ends and whether its connection stays, for HTTP/1.0 and HTTP/1.1, with every form of answer. Real sockets."""

import asyncio
import json

import pytest
from support.clients.raw_http import parse
from support.servers.listening import deaf_client, open_listener, post

STREAM = {"model": "demo", "prompt": "x", "stream": True, "max_tokens": 3}
WHOLE = {"model": "demo", "prompt": "x", "max_tokens": 3}
PREFLIGHT = "Origin: http://a.example\r\nAccess-Control-Request-Method: POST\r\n"


def get(path: str, *, version: str, headers: str, method: str = "GET") -> bytes:
    return f"{method} {path} {version}\r\nHost: x\r\n{headers}\r\n".encode()


FORMS = {
    "stream": lambda version, headers: post("/v1/completions", STREAM, version=version, headers=headers),
    "whole answer": lambda version, headers: post("/v1/completions", WHOLE, version=version, headers=headers),
    "invalid": lambda version, headers: post("/v1/completions", {"model": 1}, version=version, headers=headers),
    "not found": lambda version, headers: get("/nowhere", version=version, headers=headers),
    "page": lambda version, headers: get("/static/app.js", version=version, headers=headers),
    "not modified": lambda version, headers: get("/static/app.js", version=version, headers=f"If-None-Match: *\r\n{headers}"),
    "HEAD": lambda version, headers: get("/static/app.js", version=version, headers=headers, method="HEAD"),
    "HEAD not found": lambda version, headers: get("/nowhere", version=version, headers=headers, method="HEAD"),
    "no content": lambda version, headers: get("/v1/models", version=version, headers=PREFLIGHT + headers, method="OPTIONS"),
    "metrics": lambda version, headers: get("/metrics", version=version, headers=headers),
}  # fmt: skip
STATUS = {"invalid": 400, "not found": 404, "not modified": 304, "HEAD not found": 404, "no content": 204}
NO_BODY = ("HEAD", "HEAD not found", "not modified", "no content")


async def answer(form: str, version: str, headers: str) -> tuple[bytes, bool]:
    """All bytes of the answer to the request, and whether the connection is open afterwards."""
    async with open_listener(cors_origins=["http://a.example"]) as listener:
        client = await deaf_client(listener.port, FORMS[form](version, headers))
        received, is_open = bytearray(), False
        client.settimeout(20)
        try:
            while chunk := await asyncio.to_thread(client.recv, 65536):
                received += chunk
                client.settimeout(1.0)
        except TimeoutError:
            is_open = True
        client.close()
        return bytes(received), is_open


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("version", "headers", "stays"),
    [
        ("HTTP/1.0", "", False),
        ("HTTP/1.0", "Connection: keep-alive\r\n", True),
        ("HTTP/1.0", "Connection: close\r\n", False),
        ("HTTP/1.1", "", True),
        ("HTTP/1.1", "Connection: close\r\n", False),
    ],
)
async def test_every_answer_has_an_end(form: str, version: str, headers: str, stays: bool) -> None:
    received, is_open = await answer(form, version, headers)
    head, _, body = received.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    fields = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    assert int(first.split()[1]) == STATUS.get(form, 200) and first.startswith(version)
    is_stream = form == "stream"
    assert is_open == (stays and not (is_stream and version == "HTTP/1.0")), (
        "an answer without an end must end the connection"
    )
    if form in NO_BODY:
        assert body == b""
    elif is_stream:
        assert body.rstrip(b"0\r\n").endswith(b"data: [DONE]")
        assert ("transfer-encoding" in fields) == (version == "HTTP/1.1")
    else:
        assert int(fields["content-length"]) == len(body)
    if version == "HTTP/1.0":
        assert (fields.get("connection") == "keep-alive") == is_open, (
            "the client must learn whether it may send another"
        )
    elif not is_open:
        assert fields["connection"] == "close"


@pytest.mark.parametrize("version", ["HTTP/1.0", "HTTP/1.1"])
async def test_pipelined_requests_are_answered_in_order_up_to_the_one_that_closes(version: str) -> None:
    keep = "Connection: keep-alive\r\n"
    requests = [
        FORMS["whole answer"](version, keep),
        FORMS["page"](version, keep),
        FORMS["not found"](version, keep),
        FORMS["stream"](version, keep),
        FORMS["page"](version, "Connection: close\r\n"),
    ]
    async with open_listener() as listener:
        client = await deaf_client(listener.port, b"".join(requests))
        client.settimeout(10)
        received = bytearray()
        while chunk := await asyncio.to_thread(client.recv, 65536):
            received += chunk
        client.close()
    statuses = [answer.status for answer in parse(bytes(received))]
    # HTTP/1.0 has no chunks: the stream ends with the connection, and what follows is not answered.
    assert statuses == ([200, 200, 404, 200] if version == "HTTP/1.0" else [200, 200, 404, 200, 200])
    assert json.loads(parse(bytes(received))[0].body)["object"] == "text_completion"
