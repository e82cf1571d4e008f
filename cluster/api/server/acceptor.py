"""Accepts connections on a listening socket, also when the process runs out of file descriptors.

Knows sockets; knows no TLS, no HTTP and no limit on connections: `on_accept` gets each new socket. Without a free descriptor it stops
accepting, and tries again when a connection has ended, or after a moment. The connections wait in the kernel's backlog in the meantime.
"""

import asyncio
import errno
import logging
import socket
import time
from collections.abc import Callable

log = logging.getLogger(__name__)

RETRY_S = 1.0
WARNING_INTERVAL_S = 1.0
# asyncio accepts up to `backlog` connections at once; a thousand requests in one turn of the event loop would delay every stream.
MAX_ACCEPTS = 64


class Acceptor:
    """`start`, and later `close`, which closes the listening socket too. `retry_soon`: call it when a descriptor has become free.

    on_accept: returns whether more may be accepted in this turn of the event loop.
    """

    def __init__(self, sock: socket.socket, on_accept: Callable[[socket.socket], bool]) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._on_accept = on_accept
        self._loop = asyncio.get_running_loop()
        self._retry: asyncio.TimerHandle | None = None
        self._warning = RareWarning()

    def start(self) -> None:
        self._loop.add_reader(self._sock.fileno(), self._accept)

    def retry_soon(self) -> None:
        """Does nothing unless accepting is paused."""
        if self._retry is not None:
            self._retry.cancel()
            self._retry = self._loop.call_later(0, self._resume)

    def close(self) -> None:
        """Refuses new connections. Idempotent."""
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        if self._sock.fileno() >= 0:
            self._loop.remove_reader(self._sock.fileno())
            self._sock.close()

    def _accept(self) -> None:
        for _ in range(MAX_ACCEPTS):
            try:
                sock, _ = self._sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as e:
                self._pause(e)
                return
            sock.setblocking(False)
            if not self._on_accept(sock):
                return

    def _pause(self, e: OSError) -> None:
        self._loop.remove_reader(self._sock.fileno())
        self._retry = self._loop.call_later(RETRY_S, self._resume)
        remedy = "Raise the limit on open files (ulimit -n)." if e.errno in (errno.EMFILE, errno.ENFILE) else ""
        self._warning.log("New connections wait: accepting one failed (%s). %s", e.strerror, remedy)

    def _resume(self) -> None:
        self._retry = None
        self.start()


class RareWarning:
    """Logs at most one warning per WARNING_INTERVAL_S, whatever a client does, and how many were left out."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last = float("-inf")
        self._num_left_out = 0

    def log(self, message: str, *args: object) -> None:
        now = self._clock()
        if now - self._last < WARNING_INTERVAL_S:
            self._num_left_out += 1
            return
        left_out = f" ({self._num_left_out} like this were not logged.)" if self._num_left_out else ""
        self._last, self._num_left_out = now, 0
        log.warning("%s%s", message % args, left_out)
