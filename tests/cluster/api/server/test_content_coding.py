"""Compressed request bodies: decoded within the limit, or refused with the reason. Pure, then over HTTP."""

import asyncio
import gzip
import json
import time
import zlib
from typing import Any

import psutil
import pytest
from support.servers.listening import deaf_client, open_listener

from cluster.api.endpoints.table import ENDPOINTS
from cluster.api.server import content_coding
from cluster.api.server.content_coding import MAX_FRAMES, SUPPORTED, decode, parse_codings
from cluster.api.server.errors import HTTPError

LIMIT = 100_000
BOMB_BYTES = 256 * 2**20
TEXT = b'{"model": "demo", "prompt": "x", "max_tokens": 2}'
HAS_ZSTD = "zstd" in SUPPORTED
needs_zstd = pytest.mark.skipif(not HAS_ZSTD, reason="backports.zstd is not installed")


def bare_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(data) + packer.flush()


def zstd(data: bytes) -> bytes:
    if not HAS_ZSTD:
        return b""
    packed: bytes = content_coding.zstd.compress(data)
    return packed


PACKERS = {
    "gzip": gzip.compress,
    "x-gzip": gzip.compress,
    "GZIP": gzip.compress,
    "deflate": zlib.compress,
    "zstd": zstd,
}


@pytest.mark.parametrize(
    ("header", "codings"),
    [
        ("", ()),
        ("identity", ()),
        ("gzip", ("gzip",)),
        ("X-GZip", ("gzip",)),
        ("deflate, gzip", ("deflate", "gzip")),
        ("identity,gzip, ", ("gzip",)),
        ("br", None),
        ("gzip, br", None),
        ("gzip, gzip, gzip", None),
        ("gzip;q=1", None),
        ("x" * 500, None),
    ],
)
def test_the_header_names_codings_in_order(header: str, codings: tuple[str, ...] | None) -> None:
    if codings is not None:
        assert parse_codings(header) == codings
        return
    with pytest.raises(HTTPError) as e:
        parse_codings(header)
    assert (e.value.status, e.value.code) == (415, "unsupported_media_type")
    assert e.value.headers["Accept-Encoding"] == ", ".join(SUPPORTED)


@pytest.mark.parametrize("data", [b"", b"x", TEXT, bytes(LIMIT)], ids=len)
@pytest.mark.parametrize(
    ("coding", "pack"),
    [
        ("gzip", gzip.compress),
        ("gzip", lambda data: gzip.compress(data[:9], mtime=0) + gzip.compress(data[9:], mtime=0)),
        ("deflate", zlib.compress),
        ("deflate", bare_deflate),
        pytest.param("zstd", zstd, marks=needs_zstd),
        pytest.param("zstd", lambda data: zstd(data[:9]) + zstd(data[9:]), marks=needs_zstd),
    ],
)
def test_a_body_is_decoded_up_to_the_limit_and_not_beyond(coding: str, pack: Any, data: bytes) -> None:
    packed = pack(data)
    assert decode(packed, (coding,), max_bytes=LIMIT) == data
    assert decode(gzip.compress(packed, mtime=0), (coding, "gzip"), max_bytes=LIMIT) == data
    if data:
        assert decode(packed, (coding,), max_bytes=len(data) - 1) is None


@pytest.mark.parametrize("coding", [c for c in ("gzip", "deflate", "zstd") if c in SUPPORTED])
@pytest.mark.parametrize(
    "damage",
    [
        lambda packed: packed[:-1],
        lambda packed: packed[: len(packed) // 2],
        lambda packed: packed[:1],
        lambda packed: packed + b"trailing",
        lambda packed: b"\0" + packed,
        lambda packed: b"this is not compressed at all",
        lambda packed: packed[:12] + bytes([packed[12] ^ 0xFF]) + packed[13:],
    ],
)
def test_a_damaged_body_is_a_400(coding: str, damage: Any) -> None:
    packed = PACKERS[coding](TEXT * 20)
    with pytest.raises(HTTPError) as e:
        assert decode(damage(packed), (coding,), max_bytes=LIMIT) != TEXT * 20
        raise HTTPError(400, "decoded to something else, which is then no JSON", code="invalid_body")
    assert (e.value.status, e.value.code) == (400, "invalid_body")


BOMBS = {
    "gzip": lambda: (gzip.compress(bytes(BOMB_BYTES), 1), ("gzip",)),
    "deflate": lambda: (zlib.compress(bytes(BOMB_BYTES), 1), ("deflate",)),
    "gzip twice": lambda: (gzip.compress(gzip.compress(bytes(BOMB_BYTES), 1)), ("gzip", "gzip")),
    "empty members": lambda: (gzip.compress(b"", mtime=0) * (8 * 2**20 // 20), ("gzip",)),
    "zstd": lambda: (zstd(bytes(BOMB_BYTES)), ("zstd",)),
    "empty frames": lambda: (zstd(b"") * (8 * 2**20 // 10), ("zstd",)),
    # A header that asks for a window of 2 GiB.
    "zstd window": lambda: (b"\x28\xb5\x2f\xfd\x00\xa8" + bytes(100), ("zstd",)),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_costs_little(name: str) -> None:
    packed, codings = BOMBS[name]()
    if not HAS_ZSTD and "zstd" in codings:
        pytest.skip("backports.zstd is not installed")
    began, memory = time.process_time(), psutil.Process().memory_info().rss
    try:
        assert decode(packed, codings, max_bytes=8 * 2**20) is None
    except HTTPError as e:
        assert e.status == 400
    assert time.process_time() - began < 1.0
    assert psutil.Process().memory_info().rss - memory < 64 * 2**20


def test_many_streams_in_one_body_are_refused() -> None:
    assert decode(gzip.compress(b"x", mtime=0) * MAX_FRAMES, ("gzip",), max_bytes=LIMIT) == b"x" * MAX_FRAMES
    with pytest.raises(HTTPError):
        decode(gzip.compress(b"x", mtime=0) * (MAX_FRAMES + 1), ("gzip",), max_bytes=LIMIT)


async def answer(path: str, body: bytes, headers: str = "", **options: Any) -> tuple[int, str, bytes]:
    """Status, head and body of the answer. The server's own listener: others may decompress on their own."""
    request = f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n{headers}\r\n"
    async with open_listener(**options) as listener:
        sock = await deaf_client(listener.port, request.encode() + body)
        received = bytearray()
        while chunk := await asyncio.to_thread(sock.recv, 65536):
            received += chunk
        sock.close()
    head, _, content = bytes(received).partition(b"\r\n\r\n")
    return int(head.split()[1]), head.decode(), content


@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize", "/detokenize"])
@pytest.mark.parametrize("coding", ["gzip", "x-gzip", "GZIP", "deflate", pytest.param("zstd", marks=needs_zstd)])
async def test_every_endpoint_takes_compressed_bodies(path: str, coding: str) -> None:
    field = {"tokens": [300]} if path == "/detokenize" else {"prompt": "x"}
    body = json.dumps({"model": "demo", **field}).encode()
    plain = await answer(path, body)
    packed = await answer(path, PACKERS[coding](body), f"Content-Encoding: {coding}\r\n")
    assert plain[0] == packed[0] == 200, packed


@pytest.mark.parametrize(
    ("encoding", "body", "status", "code"),
    [
        ("gzip", gzip.compress(TEXT, mtime=0), 200, None),
        ("gzip, deflate", zlib.compress(gzip.compress(TEXT, mtime=0)), 200, None),
        ("gzip\r\nContent-Encoding: deflate", zlib.compress(gzip.compress(TEXT, mtime=0)), 200, None),
        ("identity", TEXT, 200, None),
        ("gzip", b"", 400, "invalid_json"),
        ("gzip", TEXT, 400, "invalid_body"),
        ("gzip", gzip.compress(TEXT, mtime=0)[:-1], 400, "invalid_body"),
        ("gzip", gzip.compress(b"{", mtime=0), 400, "invalid_json"),
        ("gzip", gzip.compress(b" " * 2000, mtime=0), 413, "request_too_large"),
        ("identity", b" " * 2000, 413, "request_too_large"),
        ("br", TEXT, 415, "unsupported_media_type"),
        ("gzip, br", TEXT, 415, "unsupported_media_type"),
    ],
)
async def test_the_answer_says_what_is_wrong(encoding: str, body: bytes, status: int, code: str | None) -> None:
    found, head, content = await answer(
        "/v1/completions", body, f"Content-Encoding: {encoding}\r\n", max_body_bytes=1000
    )
    assert found == status, content
    if code is not None:
        assert json.loads(content)["error"]["code"] == code
    if status == 415:
        assert f"Accept-Encoding: {', '.join(SUPPORTED)}" in head
        assert all(name in json.loads(content)["error"]["message"] for name in SUPPORTED)


async def test_a_form_cannot_be_compressed() -> None:
    form = next(e for e in ENDPOINTS if e.form is not None)
    headers = "Content-Type: multipart/form-data; boundary=x\r\nContent-Encoding: gzip\r\n"
    status, head, _ = await answer(form.path, gzip.compress(b"--x--", mtime=0), headers)
    assert status == 415 and "Accept-Encoding: identity" in head


async def test_without_a_valid_key_nothing_is_decoded() -> None:
    status, _, _ = await answer("/v1/completions", b"no gzip", "Content-Encoding: gzip\r\n", api_key="secret")
    assert status == 401
