"""Writes frames to one socket from any thread, in order, and never waits.

The calling thread sends what the socket takes at once. To wake the event loop for every step would cost the engine thread more than that,
and then a fight for the interpreter's lock. The loop sends the rest, as the peer reads. Knows bytes only.
"""

import asyncio
import contextlib
import socket
import threading
from typing import Protocol


class OpenSocket(Protocol):
    """What is needed of the socket of an asyncio transport."""

    family: int
    type: int

    def fileno(self) -> int: ...


class FrameSender:
    """`send` is for any thread, everything else for the thread of `loop`, which must outlive the sender."""

    def __init__(self, sock: OpenSocket, loop: asyncio.AbstractEventLoop, *, max_unsent_bytes: int) -> None:
        """sock: connected; the transport that reads from it stays its owner."""
        # A descriptor of its own: asyncio lets nobody else watch the transport's, and this one cannot be closed in the middle of a send.
        self._socket = socket.fromfd(sock.fileno(), sock.family, sock.type)
        self._socket.setblocking(False)
        self._loop = loop
        self._max_unsent_bytes = max_unsent_bytes
        self._lock = threading.Lock()
        self._unsent = bytearray()
        self._accepts = True
        self._done = asyncio.Event()  # `finish` was called, and all is sent or lost

    def send(self, frame: bytes) -> bool:
        """Sends the frame or queues it. False if the peer has left too much unread: the queue is dropped, and so is all that follows."""
        with self._lock:
            if not self._accepts:
                return True
            num_sent = 0 if self._unsent else self._send_now(frame)
            if num_sent == len(frame):
                return True
            if len(self._unsent) + len(frame) - num_sent > self._max_unsent_bytes:
                self._give_up()
                return False
            must_watch = not self._unsent
            self._unsent += memoryview(frame)[num_sent:]
            if must_watch:
                with contextlib.suppress(RuntimeError):  # the loop has ended: the process is about to
                    self._loop.call_soon_threadsafe(self._watch)
            return True

    def finish(self) -> None:
        """Accepts no more frames. The peer gets the end of the stream after what is queued."""
        with self._lock:
            self._accepts = False
            if not self._unsent:
                self._end()

    async def sent(self) -> None:
        """Returns once all is sent or lost; call `finish` before."""
        await self._done.wait()

    def close(self) -> None:
        """Drops what is queued. Idempotent."""
        with self._lock:
            self._give_up()
            if self._socket.fileno() >= 0:
                self._loop.remove_writer(self._socket)
            self._socket.close()
            self._done.set()

    def _send_now(self, data: bytes | bytearray) -> int:
        """How many bytes the socket took."""
        try:
            return self._socket.send(data)
        except BlockingIOError:
            return 0
        except OSError:  # the peer is gone: the reader of the connection learns it too, and closes it
            self._give_up()
            return len(data)

    def _watch(self) -> None:
        with self._lock:
            if self._unsent:
                self._loop.add_writer(self._socket, self._flush)

    def _flush(self) -> None:
        with self._lock:
            num_sent = self._send_now(self._unsent)
            del self._unsent[:num_sent]
            if not self._unsent:
                self._loop.remove_writer(self._socket)
                if not self._accepts:
                    self._end()

    def _give_up(self) -> None:
        self._accepts = False
        self._unsent.clear()

    def _end(self) -> None:
        with contextlib.suppress(OSError):  # the peer is gone
            self._socket.shutdown(socket.SHUT_WR)
        self._done.set()
