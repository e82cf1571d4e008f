"""Physical KV blocks as numbers: who is free, who is shared, who holds which content.

Knows no requests and no torch. Block 0 is the null block, never allocated: it stands for blocks released behind the
window. A block whose last holder lets go keeps its content until it is allocated again, least recently used first;
until then a prefix with the same hash takes it back (the prefix cache of vLLM).
"""

from collections import OrderedDict
from collections.abc import Iterable

from workers.kv_cache.diff import CacheDiff
from workers.protocol import CacheEvents

NULL_BLOCK = 0


class BlockPool:
    """`num_blocks` usable blocks, numbered from 1. All operations are O(1) per block."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._ref_counts = [0] * (num_blocks + 1)
        self._hash_of: dict[int, bytes] = {}
        self._cached: dict[bytes, int] = {}
        self._diff = CacheDiff()
        # In the order of eviction.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks + 1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    def find(self, block_hash: bytes) -> int | None:
        """The block that holds this content, held or free, or None."""
        return self._cached.get(block_hash)

    def is_free(self, block_id: int) -> bool:
        return block_id in self._free

    def hold(self, block_ids: Iterable[int]) -> None:
        """One more holder for each; null blocks are passed over."""
        for block_id in block_ids:
            if block_id == NULL_BLOCK:
                continue
            if self._ref_counts[block_id] == 0:
                del self._free[block_id]
            self._ref_counts[block_id] += 1

    def allocate(self, count: int) -> list[int]:
        """`count` blocks with one holder and no known content. The caller has checked `num_free`."""
        assert count <= len(self._free), f"asked for {count} blocks of {len(self._free)} free"
        block_ids = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block_id in block_ids:
            self._ref_counts[block_id] = 1
            block_hash = self._hash_of.pop(block_id, None)
            if block_hash is not None:
                del self._cached[block_hash]
                self._diff.evict(block_hash)
        return block_ids

    def name(self, block_id: int, block_hash: bytes) -> None:
        """Says what a full block holds. The first block of a content keeps the name; a twin stays nameless."""
        if block_hash not in self._cached:
            self._cached[block_hash] = block_id
            self._hash_of[block_id] = block_hash
            self._diff.store(block_hash)

    def take_events(self) -> CacheEvents | None:
        """Which contents became findable and which were lost since the last call; None when neither."""
        return self._diff.take()

    def release(self, block_ids: Iterable[int]) -> None:
        """One holder less for each, in the order in which they may be evicted; null blocks are passed over."""
        for block_id in block_ids:
            if block_id == NULL_BLOCK:
                continue
            self._ref_counts[block_id] -= 1
            assert self._ref_counts[block_id] >= 0, f"block {block_id} released more often than held"
            if self._ref_counts[block_id] == 0:
                self._free[block_id] = None
                if block_id not in self._hash_of:
                    # Nobody can find it again: use it before any cached one.
                    self._free.move_to_end(block_id, last=False)
