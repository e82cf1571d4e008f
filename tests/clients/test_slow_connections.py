"""The long form of attacks on connections, with the deadlines of a real server: clients that read nothing or little, handshakes that do not
begin, and few file descriptors. Minutes; `make test-attack`."""

import contextlib
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.servers.certificates import make_pair
from support.servers.listener_process import ListenerProcess
from support.servers.listening import GET, post

from cluster.api.server.listener import HEAD_TIMEOUT_S, IDLE_TIMEOUT_S, WRITE_TIMEOUT_S

pytestmark = [pytest.mark.attack, pytest.mark.timeout(400)]
MARGIN_S = 20.0  # the deadline is polled, and the machine may be busy
DEADLINES = {
    "head_timeout_s": HEAD_TIMEOUT_S,
    "idle_timeout_s": IDLE_TIMEOUT_S,
    "write_timeout_s": WRITE_TIMEOUT_S,
    "max_connections": 16_384,
}
WHOLE_ANSWER = post("/tokenize", {"model": "demo", "prompt": "a b c " * 200_000})  # 2.4 MB
PAGES = b"GET /static/playground.js HTTP/1.1\r\nHost: x\r\n\r\n" * 30


def connect(port: int, data: bytes) -> socket.socket:
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.settimeout(20)
    sock.connect(("127.0.0.1", port))
    sock.sendall(data)
    return sock


@contextlib.contextmanager
def clients(port: int, number: int, data: bytes = b"") -> Iterator[list[socket.socket]]:
    socks = [connect(port, data) for _ in range(number)]
    try:
        yield socks
    finally:
        for sock in socks:
            sock.close()


def check_alive(server: ListenerProcess, *, tls: bool = False) -> None:
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as sock:
        if tls:
            context = ssl.create_default_context()
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            sock = context.wrap_socket(sock)
        sock.sendall(f"{GET}Connection: close\r\n\r\n".encode())
        assert sock.recv(15) == b"HTTP/1.1 200 OK"
        sock.close()
    assert time.monotonic() - began < 5.0
    assert "Traceback" not in "".join(server.log)


def read_slowly(socks: list[socket.socket], server: ListenerProcess, *, until_s: float) -> float:
    """200 bytes a second each. Returns when the server has no connection any more, or after until_s."""
    began = time.monotonic()
    for sock in socks:
        sock.setblocking(False)
    while server.num_connections() and time.monotonic() - began < until_s:
        for sock in socks:
            with contextlib.suppress(OSError):
                sock.recv(200)
        time.sleep(1.0)
    return time.monotonic() - began


@pytest.mark.parametrize(("form", "number", "request_"), [("whole answers", 40, WHOLE_ANSWER), ("pages", 400, PAGES)])
@pytest.mark.parametrize("reads", [False, True], ids=["unread", "200 bytes a second"])
def test_slow_readers_are_gone_after_the_deadline(form: str, number: int, request_: bytes, reads: bool) -> None:
    with ListenerProcess(**DEADLINES) as server:
        before = server.rss_bytes()
        with clients(server.port, number, request_) as socks:
            limit_s = WRITE_TIMEOUT_S + MARGIN_S
            took_s = read_slowly(socks, server, until_s=limit_s) if reads else server.until_gone(timeout_s=limit_s)
            left = server.num_connections()
            print(
                f"\n{number} readers of {form}: {left} connections left after {took_s:.0f} s, of a deadline of {WRITE_TIMEOUT_S:g} s"
            )
            assert left == 0
            check_alive(server)
        print(f"memory: {before >> 20} MiB before, {server.rss_bytes() >> 20} after")


def test_tls_connections_without_a_handshake_are_gone_after_the_deadline(tmp_path: Path) -> None:
    with ListenerProcess(certificate=make_pair(tmp_path, "server"), **DEADLINES) as server, clients(server.port, 700):
        check_alive(server, tls=True)
        took_s = server.until_gone(timeout_s=HEAD_TIMEOUT_S + MARGIN_S)
        print(
            f"\n700 TLS connections: {server.num_connections()} left after {took_s:.0f} s, of a deadline of {HEAD_TIMEOUT_S:g} s"
        )
        assert server.num_connections() == 0
        check_alive(server, tls=True)


def test_a_minute_with_64_descriptors() -> None:
    with ListenerProcess(max_descriptors=64, **DEADLINES) as server:
        cpu_s, began, num_served = server.cpu_s(), time.monotonic(), 0
        with clients(server.port, 500):
            while time.monotonic() - began < 60.0:
                check_alive(server)
                num_served += 1
                time.sleep(0.2)
        log, cpu_s = "".join(server.log), server.cpu_s() - cpu_s
        print(
            f"\n64 descriptors, 500 clients, 60 s: {num_served} requests served, {len(server.log)} lines of log, {cpu_s:.1f} CPU s"
        )
        assert len(server.log) <= 62 and "Traceback" not in log
        assert cpu_s < 30
