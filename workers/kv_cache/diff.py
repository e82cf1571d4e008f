"""What a set of cached blocks gained and lost since somebody last asked, without what cancelled out in between.

Kept by the block pool for the engine's step, and by the stream server for every connection that has no frame to carry it yet.
Knows only hashes. However long nobody asks, it holds no more than the set itself plus what the asker knew.
"""

from workers.protocol import CacheEvents


class CacheDiff:
    """`store` and `evict` in the order in which they happen; `take` says what they come to. Belongs to one thread."""

    def __init__(self) -> None:
        # Ordered: a block is stored after the one before it in the prefix.
        self._stored: dict[bytes, None] = {}
        self._evicted: dict[bytes, None] = {}

    def store(self, block_hash: bytes) -> None:
        if block_hash in self._evicted:  # the asker still knows it
            del self._evicted[block_hash]
        else:
            self._stored[block_hash] = None

    def evict(self, block_hash: bytes) -> None:
        if block_hash in self._stored:  # the asker never heard of it
            del self._stored[block_hash]
        else:
            self._evicted[block_hash] = None

    def add(self, events: CacheEvents) -> None:
        """What another diff came to, after all that is in this one."""
        for block_hash in events.evicted:
            self.evict(block_hash)
        for block_hash in events.stored:
            self.store(block_hash)

    def take(self) -> CacheEvents | None:
        """The net change since the last call; None when there is none."""
        if not self._stored and not self._evicted:
            return None
        events = CacheEvents(stored=list(self._stored), evicted=list(self._evicted))
        self._stored.clear()
        self._evicted.clear()
        return events
