"""How a set of cached blocks changed since the last call of `take`, without changes that cancelled out.

The block pool keeps one for the engine's step, and the stream server one per connection that has no frame to carry it yet. Knows only
hashes. However rarely `take` is called, a diff holds at most the set itself plus what the last call reported.
"""

from workers.protocol import CacheEvents


class CacheDiff:
    """Call `store` and `evict` in the order in which they happen; `take` returns the net change. Belongs to one thread."""

    def __init__(self) -> None:
        # Ordered: a block is stored after the one before it in the prefix.
        self._stored: dict[bytes, None] = {}
        self._evicted: dict[bytes, None] = {}

    def store(self, block_hash: bytes) -> None:
        if block_hash in self._evicted:  # the reader still knows it
            del self._evicted[block_hash]
        else:
            self._stored[block_hash] = None

    def evict(self, block_hash: bytes) -> None:
        if block_hash in self._stored:  # the reader never heard of it
            del self._stored[block_hash]
        else:
            self._evicted[block_hash] = None

    def add(self, events: CacheEvents) -> None:
        """Appends another diff's net change to this one."""
        for block_hash in events.evicted:
            self.evict(block_hash)
        for block_hash in events.stored:
            self.store(block_hash)

    def take(self) -> CacheEvents | None:
        """The net change since the last call; None without one."""
        if not self._stored and not self._evicted:
            return None
        events = CacheEvents(stored=list(self._stored), evicted=list(self._evicted))
        self._stored.clear()
        self._evicted.clear()
        return events
