"""One gateway's connection as rank 0 keeps it: what the gateway submitted, the cache events it has not received, and sends that never wait.

Knows frames; which of them to send is the stream server's decision, and so is which thread may do what: it holds a lock around all that
both of its threads use.
"""

import asyncio
import logging

import msgspec

from workers.heartbeat import PeerClock
from workers.kv_cache.diff import CacheDiff
from workers.protocol import (
    FRAME_HEADER_BYTES,
    LoadReport,
    StepFrame,
    TokenDelta,
    ToReplica,
    encode_frame,
    frame_length,
)
from workers.rank.frame_sender import FrameSender

log = logging.getLogger(__name__)

# A gateway that has left this much unread will not catch up: it is cut off, and the engine goes on.
MAX_UNSENT_BYTES = 64 * 1024 * 1024

_decoder = msgspec.msgpack.Decoder(ToReplica)


class Connection:
    """One gateway. Engine-side ids carry the connection's number, so that no gateway can touch another's requests."""

    def __init__(self, number: int, writer: asyncio.StreamWriter, now: float) -> None:
        self.prefix = f"{number}/"
        self.peer = writer.get_extra_info("peername")
        self.requests: set[str] = set()  # ids as the client knows them
        self.clock = PeerClock(now)
        self.unsent_events = CacheDiff()
        self._writer = writer
        self._loop = asyncio.get_running_loop()
        self._sender = FrameSender(writer.get_extra_info("socket"), self._loop, max_unsent_bytes=MAX_UNSENT_BYTES)

    def send(self, frame: bytes, now: float) -> None:
        """Sends or queues the frame and never waits; a client that does not read is cut off when its queue is full. From any thread."""
        if not self._sender.send(frame):
            log.warning("Closing %s: it has left %d MiB unread.", self.peer, MAX_UNSENT_BYTES >> 20)
            self._loop.call_soon_threadsafe(self.drop)
        self.clock.sent(now)

    def send_deltas(self, deltas: list[TokenDelta], load: LoadReport, now: float) -> None:
        """All in one frame, but each prompt's log-probabilities in a frame of their own: together they could exceed a frame's limit."""
        small = [delta for delta in deltas if delta.prompt_logprobs is None]
        large = [[delta] for delta in deltas if delta.prompt_logprobs is not None]
        for part in [small, *large] if small else large:
            self.send(encode_frame(StepFrame(deltas=part, load=load, cache=self.unsent_events.take())), now)

    def drop(self) -> None:
        self._writer.transport.abort()

    def finish(self) -> None:
        """Lets the client read to the end. Nothing more is sent, but the connection is still read until the client closes it."""
        self._sender.finish()

    async def finished(self) -> None:
        """Returns once the client was sent the end, or is gone; call `finish` before."""
        await self._sender.sent()

    def close(self) -> None:
        """Idempotent."""
        self._writer.close()
        self._sender.close()


async def read_message(reader: asyncio.StreamReader, max_bytes: int) -> ToReplica:
    """Raises ValueError for a frame that is too large, msgspec.DecodeError for one that is broken."""
    length = frame_length(await reader.readexactly(FRAME_HEADER_BYTES), max_bytes)
    return _decoder.decode(await reader.readexactly(length))
