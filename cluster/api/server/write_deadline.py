"""Whether a client takes what is sent to it. Knows one connection's unsent bytes, not how its answer was made.

A client must take MIN_BYTES per period, or everything there is. So a client that reads nothing, or a few bytes a second, is late after one
period, and one with a slow line never is. `WriteDeadline` is pure: bytes and times are arguments.
"""

import asyncio
import fcntl
import socket
import struct
import termios
from collections.abc import Iterable
from typing import Any

MIN_BYTES = 64 * 1024  # per period of a minute: a kilobyte a second


class WriteDeadline:
    """`is_late` must be called several times per period."""

    def __init__(self, period_s: float, *, min_bytes: int = MIN_BYTES) -> None:
        self._period_s = period_s
        self._min_bytes = min_bytes
        self._since: float | None = None
        self._num_taken = 0

    def is_late(self, *, num_written: int, num_waiting: int, closing: bool, now: float) -> bool:
        """num_written: bytes of all answers so far. num_waiting: of them, those that the client has not taken. closing: the connection
        closes as soon as it has taken them."""
        if not num_waiting and not closing:
            self._since = None
            return False
        num_taken = num_written - num_waiting
        if self._since is None or num_taken - self._num_taken >= self._min_bytes:
            self._since, self._num_taken = now, num_taken
            return False
        return now - self._since >= self._period_s


class CountedTransport:
    """asyncio's transport with a count of the bytes written to it. Closing it twice is harmless, which asyncio's TLS transport is not."""

    __slots__ = ("_closed", "_transport", "get_write_buffer_size", "is_closing", "num_written")

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._closed = False
        self.num_written = 0
        # Called with every write, so they skip __getattr__.
        self.is_closing = transport.is_closing
        self.get_write_buffer_size = transport.get_write_buffer_size

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    @property
    def _sendfile_compatible(self) -> None:
        # asyncio reads this before it sends a file past the transport, where nothing is counted. aiohttp answers the error by sending the
        # file in chunks, through `write`.
        raise NotImplementedError

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._transport.close()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.num_written += len(data)
        self._transport.write(data)

    def writelines(self, chunks: Iterable[bytes | bytearray | memoryview]) -> None:
        chunks = list(chunks)
        self.num_written += sum(map(len, chunks))
        self._transport.writelines(chunks)


def num_unacknowledged(sock: socket.socket) -> int:
    """Bytes in the kernel that the other end has not received. 0 for a closed socket, and on systems that do not tell."""
    try:
        return struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4)))[0]
    except (OSError, ValueError):
        return 0
