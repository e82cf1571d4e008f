"""Invalid HTTP: compressed and endless bodies, wrong lengths, odd versions, methods, targets and headers, garbage, slow clients,
pipelines and abandoned connections.

After each group the server must answer a good request. The fixture `attacker` has the checks at the end.
"""

import gzip
import json
import os
import random
import socket
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
from support.clients.attacker import GOOD, GOOD_REQUEST, MIB
from support.clients.fuzz_bodies import PLAIN
from support.clients.raw_http import parse, request, send
from support.servers.live_listener import KEY

SEED = 7


def bomb(num_mib: int, encoding: str) -> bytes:
    """Compressed spaces, with this decompressed size in MiB."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31 if encoding == "gzip" else 15)
    block = b" " * MIB
    return b"".join(packer.compress(block) for _ in range(num_mib)) + packer.flush()


@pytest.mark.parametrize(
    ("encoding", "body"),
    [
        ("gzip", partial(bomb, 256, "gzip")),
        ("deflate", partial(bomb, 256, "deflate")),
        ("gzip", lambda: gzip.compress(bomb(64, "gzip"))),
        ("gzip", b"this is not gzip"),
        ("gzip", gzip.compress(GOOD)[:-6]),
        ("gzip", gzip.compress(GOOD) + b"trailing"),
        ("deflate", os.urandom(200)),
        ("br", os.urandom(200)),
        ("zstd", os.urandom(200)),
        ("zstd", bytes.fromhex("28b52ffd") + b"\xff" * 50),
        ("gzip, gzip", gzip.compress(gzip.compress(GOOD))),
        ("identity", GOOD),
        ("x" * 500, GOOD),
    ],
    ids=lambda value: value[:12] if isinstance(value, str) else "bomb" if callable(value) else len(value),
)
def test_compressed_bodies(attacker, encoding, body):
    body = body() if callable(body) else body
    before = attacker.target.rss_bytes
    for key in (KEY, "wrong"):  # without a valid key, bodies must not be decompressed either
        answers = attacker.attack(request("/v1/completions", body, key=key, headers=[("Content-Encoding", encoding)]))
        assert len(answers) == 1
    assert attacker.target.rss_bytes - before < 100 * MIB
    attacker.check_alive()


@pytest.mark.parametrize(
    "content_type",
    [
        None,
        "",
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "multipart/form-data; boundary=" + "x" * 5000,
        "application/json; charset=utf-16",
        "application/json; charset=nonsense",
        "application/json; charset=" + "é" * 10,
        "APPLICATION/JSON",
        "application/json, application/json",
        ";;;=",
        "application/xml",
        "\udcff\udcfe",
    ],
)
def test_content_types(attacker, content_type):
    for body in (GOOD, GOOD.decode().encode("utf-16"), b"\xef\xbb\xbf" + GOOD, b"a=b&c=d", b""):
        answer = attacker.post("/v1/completions", body, content_type=content_type)
        assert answer.status in (200, 400, 415), answer
    attacker.check_alive()


VERSIONS = [
    "HTTP/0.9",
    "HTTP/1.0",
    "HTTP/2.0",
    "HTTP/3",
    "HTTP/9.9",
    "HTTP/1.11",
    "HTTP/01.1",
    "http/1.1",
    "",
    "X",
    "HTTP/",
]
METHODS = ["GET", "PUT", "DELETE", "PATCH", "TRACE", "OPTIONS", "PROPFIND", "PRI", "post", "M" * 3000, "PO ST", "é"]
TARGETS = [
    *("", "*", "//", "/\t", "/ x", "/" + "a" * 9000, "/v1/models#x", "/v1/models;x=y", "http://example.com/v1/models"),
    *(
        "/v1/models/" + "%00" * 50,
        "/v1/models/../../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/v1/models/%",
        "/v1/models/%ff%fe",
    ),
    *("/v1/models/\udcff\udcfe", "/v1/models?" + "a=b&" * 2000, "/debug/route?policy=%00", "/debug/route?prompt=%ff"),
    *("/debug/route?prompt_token_ids=" + "1," * 3000, "/debug/route?prompt_token_ids=" + "9" * 4000),
    *("/debug/route?prompt=" + "a" * 7000, "/debug/route?" + "prompt=x&" * 500),
]
HEADERS = {
    "Authorization": ["", "Bearer", "Bearer ", "Basic eDp5", "Bearer \udcff", "Bearer " + "k" * 7000, "bearer " + KEY],
    "X-Request-Timeout": ["nan", "inf", "-1", "0", "1e999", "x", "1" * 5000, ""],
    "X-Request-Id": ["\udcff", "a" * 5000, "a\tb", "%0d%0aSet-Cookie: x", "é"],
    "Content-Length": ["-1", "x", "1e3", "9" * 30, "0x10", "+5", "5, 5", "", "1_0"],
    "Transfer-Encoding": ["chunked, chunked", "gzip, chunked", "x", "identity", ""],
    "Expect": ["100-continue", "200-ok", ""],
    "Host": ["", "a b", "\udcff", "x" * 5000],
    "Connection": ["upgrade", "close", "x" * 1000],
    "Upgrade": ["websocket", "h2c"],
    "X": ["y" * 20_000, "\x00", "a\r\n folded", "a\nY: b"],
    "Bad Name": ["x"],
    "": ["x"],
    "X\x00Y": ["x"],
    "Range": ["bytes=0-"],
    "Cookie": ["a=b; " * 1000],
}
SEVERAL_HEADERS = [
    [(f"X-{i}", "y") for i in range(3000)],
    [("Content-Length", str(len(GOOD))), ("Content-Length", "3")],
    [("Content-Length", str(len(GOOD))), ("Transfer-Encoding", "chunked")],
    [("Authorization", "Bearer a"), ("Authorization", f"Bearer {KEY}")],
]


def test_odd_versions_methods_and_targets(attacker):
    for version in VERSIONS:
        attacker.attack(request("/v1/completions", GOOD, key=KEY, version=version), patience_s=0.3)
    for method in METHODS:
        for path in ("/v1/completions", "/health", "/nowhere"):
            attacker.attack(request(path, key=KEY, method=method), method=method, patience_s=0.3)
    attacker.attack(request("/v1/completions", key=KEY, method="HEAD"), method="HEAD", patience_s=0.3)
    attacker.attack(b"CONNECT example.com:443 HTTP/1.1\r\nHost: example.com:443\r\n\r\n", patience_s=0.3)
    for target in TARGETS:
        attacker.attack(request(target, method="GET", key=KEY, content_type=None), method="GET", patience_s=0.3)
    attacker.check_alive()


def test_odd_headers(attacker):
    for headers in [*SEVERAL_HEADERS, *([(name, value)] for name, values in HEADERS.items() for value in values)]:
        key = None if headers[0][0] == "Authorization" else KEY
        attacker.attack(request("/v1/completions", GOOD, key=key, headers=headers), patience_s=0.3)
    attacker.check_alive()


def test_garbage(attacker):
    rng = random.Random(SEED)
    for data in (
        *(
            b"\x00" * 100,
            b"\r\n" * 5000,
            b"\n",
            b" ",
            b"GET",
            b"GET /\r\n\r\n",
            b"GET / HTTP/1.1",
            b":\r\n\r\n",
            b"\xff" * 5000,
        ),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00",
        bytes.fromhex("16030100f8010000f40303") + rng.randbytes(200),  # a TLS hello
        b"GET / HTTP/1.1\nHost: x\n\n",
        b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X: y\r\n" * 50_000,
        b"A" * 300_000,
        GOOD_REQUEST[: len(GOOD_REQUEST) // 2],
        GOOD_REQUEST.replace(b"\r\n", b"\n"),
        GOOD_REQUEST.replace(b"\r\n", b"\r"),
        *(bytes(b ^ (rng.random() < 0.02) * rng.randrange(256) for b in GOOD_REQUEST) for _ in range(150)),
        *(rng.randbytes(rng.randrange(1, 2000)) for _ in range(50)),
    ):
        attacker.attack(data, patience_s=0.3)
    attacker.check_alive()


def chunked(body: bytes) -> bytes:
    return f"{len(body):x}\r\n".encode() + body + b"\r\n"


CHUNKS = [
    *(b"zz\r\n", b"-5\r\nabc\r\n", b"5\r\nabc", b"\r\n\r\n", b"0x5\r\nabcde\r\n", b"5 5\r\nabcde\r\n0\r\n\r\n"),
    *(b"FFFFFFFFFFFFFFFFF\r\nabc\r\n", b"7fffffffffffffff\r\n", b"5\r\nabcdefgh\r\n0\r\n\r\n"),
    b"5;" + b"x" * 50_000 + b"\r\nabcde\r\n",
    b"0\r\n" + b"X: y\r\n" * 5000 + b"\r\n",
    chunked(GOOD) + b"0\r\nContent-Length: 5\r\n\r\n",
]


def test_chunked_bodies(attacker):
    head = request("/v1/completions", key=KEY, headers=[("Transfer-Encoding", "chunked")])
    (answer,) = attacker.attack(head + chunked(GOOD[:10]) + chunked(GOOD[10:]) + b"0\r\n\r\n")
    assert answer.status == 200
    for rest in CHUNKS:
        attacker.attack(head + rest, patience_s=0.3)
        attacker.check_alive()
    # Without an end: refused once it is too large.
    before = attacker.target.rss_bytes
    endless = [head, *([chunked(b" " * 65_536)] * 1000)]
    answers = attacker.attack(endless)
    assert all(a.status == 413 for a in answers), answers
    assert attacker.target.rss_bytes - before < 100 * MIB


def test_slow_clients_are_disconnected_and_do_not_delay_others(attacker):
    """The target allows two seconds for a head and for a body; most of these never finish."""
    at = GOOD_REQUEST.index(b"\r\n\r\n") + 4
    drip = [bytes([b]) for b in GOOD_REQUEST]
    slow = [
        *([drip] * 5),
        *([[GOOD_REQUEST[:at], *([b" "] * 30)]] * 3),
        [GOOD_REQUEST[:at]],
        [GOOD_REQUEST[:20]],
        [b"POST /v1/completions HTTP/1.1\r\n", *([b"X: y\r\n"] * 30)],
        [request("/v1/completions", key=KEY, headers=[("Transfer-Encoding", "chunked")]), *([b"1\r\n \r\n"] * 30)],
        [request("/v1/completions", GOOD, key=KEY, length=10**6)],
        [request("/v1/completions", GOOD, key="wrong", length=10**6)],
    ]
    with ThreadPoolExecutor(len(slow)) as threads:
        futures = [threads.submit(send, attacker.target.port, pieces, pause_s=0.4) for pieces in slow]
        for _ in range(10):
            attacker.check_alive()
        for future, pieces in zip(futures, slow, strict=True):
            for answer in parse(future.result()):
                answer.check()
                assert answer.status in (401, 408), (pieces[0], answer)


def test_pipelines_and_abandoned_connections(attacker):
    port = attacker.target.port
    answers = parse(send(port, GOOD_REQUEST * 20, until_closed=True, patience_s=3.0))
    assert [a.status for a in answers] == [200] * 20
    for data in (
        GOOD_REQUEST + b"\x00" * 1000,
        GOOD_REQUEST + b"{" * 100_000,
        b"\r\n\r\n" + GOOD_REQUEST,
        GOOD_REQUEST + GOOD_REQUEST[:30],
        GOOD_REQUEST * 2 + b"GET / HTTP/9\r\n\r\n",
    ):
        for answer in parse(send(port, data, until_closed=True, patience_s=0.5)):
            answer.check()
    attacker.check_alive()
    endless = json.dumps(
        {**PLAIN["/v1/completions"], "max_tokens": 60, "n": 64, "stream": True, "ignore_eos": True}
    ).encode()
    stream = request("/v1/completions", endless, key=KEY)
    for data in [b"", GOOD_REQUEST[:50], GOOD_REQUEST, stream] * 25:  # and disconnected
        with socket.create_connection(("127.0.0.1", port)) as sock:
            sock.sendall(data)
    sockets = [socket.create_connection(("127.0.0.1", port)) for _ in range(200)]  # and silent
    try:
        attacker.check_alive()
    finally:
        for sock in sockets:
            sock.close()
    attacker.check_alive()
