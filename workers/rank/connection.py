"""One gateway's connection as rank 0 keeps it: what it submitted, what it has not been told yet, and bytes that never wait.

Knows frames as bytes; their meaning is the stream server's. Belongs to the server's thread.
"""

import asyncio
import contextlib
import logging

from workers.kv_cache.diff import CacheDiff

log = logging.getLogger(__name__)

MAX_UNSENT_BYTES = 64 * 1024 * 1024  # a gateway this far behind will not catch up: it is cut off, the engine goes on


class Connection:
    """One gateway. Engine-side ids carry the connection's number, so that no gateway can touch another's requests."""

    def __init__(self, number: int, writer: asyncio.StreamWriter, now: float) -> None:
        self.prefix = f"{number}/"
        self.peer = writer.get_extra_info("peername")
        self.requests: set[str] = set()  # ids as the client knows them
        self.last_received = now
        self.last_sent = now
        self.unsent_events = CacheDiff()
        self._finished = False
        self._writer = writer

    def send(self, frame: bytes, now: float) -> None:
        """Queues the frame and never waits; a client that does not read is cut off when its buffer is full."""
        transport = self._writer.transport
        if self._finished or transport.is_closing():
            return
        if transport.get_write_buffer_size() + len(frame) > MAX_UNSENT_BYTES:
            log.warning("Closing %s: it has left %d MiB unread.", self.peer, MAX_UNSENT_BYTES >> 20)
            transport.abort()
            return
        self._writer.write(frame)
        self.last_sent = now

    def drop(self) -> None:
        self._writer.transport.abort()

    def finish(self) -> None:
        """Lets the client read to the end; nothing is sent any more, but until it closes it is still read from."""
        self._finished = True
        with contextlib.suppress(OSError):  # the client has gone meanwhile
            self._writer.write_eof()

    async def close(self) -> None:
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()
