"""Accepting without file descriptors: it pauses, says so at most once a second, and goes on. With a socket that fails as asked, then in a
process with a low limit."""

import asyncio
import contextlib
import errno
import logging
import os
import socket
import time

import pytest
from support.servers.listener_process import ListenerProcess
from support.servers.listening import GET, until

from cluster.api.server import acceptor
from cluster.api.server.acceptor import Acceptor, RareWarning

NUM_DESCRIPTORS = 64


class Scarce:
    """A listening socket that cannot accept while `error` is set."""

    def __init__(self) -> None:
        self.sock = socket.create_server(("127.0.0.1", 0))
        self.error: int | None = None
        self.num_failures = 0
        self.fileno, self.close, self.setblocking = self.sock.fileno, self.sock.close, self.sock.setblocking

    def accept(self) -> tuple[socket.socket, object]:
        if self.error is not None:
            self.num_failures += 1
            raise OSError(self.error, os.strerror(self.error))
        return self.sock.accept()


@pytest.mark.parametrize("error", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
async def test_it_pauses_and_goes_on_after_a_moment_or_when_told(
    error: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(acceptor, "RETRY_S", 0.3)
    scarce, accepted = Scarce(), []

    def accept(sock: socket.socket) -> bool:
        accepted.append(sock)
        return True

    accepting = Acceptor(scarce, accept)  # type: ignore[arg-type]
    accepting.start()
    scarce.error = error
    client = socket.create_connection(scarce.sock.getsockname())
    await until(lambda: scarce.num_failures == 1)
    for _ in range(20):
        await asyncio.sleep(0)
    assert scarce.num_failures == 1, "the socket stays readable, and must not be polled"
    await until(lambda: scarce.num_failures == 3)
    scarce.error = None
    await until(lambda: len(accepted) == 1)
    scarce.error = error
    more = socket.create_connection(scarce.sock.getsockname())
    await until(lambda: scarce.num_failures == 4)
    monkeypatch.setattr(acceptor, "RETRY_S", 1000.0)
    scarce.error = None
    accepting.retry_soon()
    await until(lambda: len(accepted) == 2)
    accepting.retry_soon()  # not paused: nothing happens
    accepting.close()
    accepting.close()
    assert len(caplog.records) <= 2 and all(r.levelno == logging.WARNING for r in caplog.records)
    assert ("ulimit -n" in caplog.text) == (error != errno.ENOMEM)
    for sock in (client, more, *accepted):
        sock.close()


def test_a_warning_that_repeats_is_logged_once_a_second(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    warning = RareWarning(clock=lambda: now)
    for i in range(1000):
        now = i / 100
        warning.log("Out of %s.", "room")
    assert len(caplog.records) == 10
    assert caplog.messages[1] == "Out of room. (99 like this were not logged.)"


def ask(port: int) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as sock:
        sock.sendall(f"{GET}Connection: close\r\n\r\n".encode())
        return sock.recv(15)


def test_a_server_with_few_descriptors_stays_up_and_quiet() -> None:
    with ListenerProcess(max_descriptors=NUM_DESCRIPTORS, idle_timeout_s=60, max_connections=16_384) as server:
        cpu_s, began = server.cpu_s(), time.monotonic()
        clients = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(3 * NUM_DESCRIPTORS)]
        try:
            while time.monotonic() - began < 2.0:
                assert ask(server.port) == b"HTTP/1.1 200 OK", "the oldest idle connection makes room"
                time.sleep(0.1)
            assert server.num_connections() < NUM_DESCRIPTORS
            assert server.cpu_s() - cpu_s < 1.5
        finally:
            for client in clients:
                client.close()
        assert ask(server.port) == b"HTTP/1.1 200 OK"
        log = server.log
    assert 1 <= len(log) <= 10, log
    assert "Traceback" not in "".join(log)


def test_busy_connections_are_never_closed_to_make_room() -> None:
    busy = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n"
    with ListenerProcess(max_descriptors=NUM_DESCRIPTORS, body_timeout_s=3.0, max_connections=16_384) as server:
        clients = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(2 * NUM_DESCRIPTORS)]
        for client in clients:
            client.settimeout(20)
            try:
                client.sendall(busy)
            except ConnectionError:
                continue
        num_answers = 0
        for client in clients:
            with contextlib.suppress(ConnectionError):
                num_answers += client.recv(12) == b"HTTP/1.1 408"
            client.close()
        assert num_answers > NUM_DESCRIPTORS // 4, "those that were accepted get their answer"
        assert ask(server.port) == b"HTTP/1.1 200 OK"
        assert "Traceback" not in "".join(server.log)
