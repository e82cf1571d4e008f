"""Physical KV blocks as numbers: which are free, how many sequences hold each, and which content can be found by hash.

Knows no requests and no torch. Block 0 is the null block and is never allocated: it replaces blocks that the window has passed. A block
whose last reference is released keeps its content until it is allocated again, least recently used first. Until then a prefix with the
same hash can use it (vLLM's prefix cache).

Where layers have different windows, a block belongs to one group of layers at a time, and content is found by hash and group. Which content
is there is told for the first group only, whose window is the widest.
"""

from collections import OrderedDict
from collections.abc import Iterable, KeysView

from workers.kv_cache.diff import CacheDiff
from workers.protocol import CacheEvents

NULL_BLOCK = 0


class BlockPool:
    """`num_blocks` usable blocks, numbered from 1. All operations are O(1) per block."""

    def __init__(self, num_blocks: int, *, num_groups: int = 1) -> None:
        self.num_blocks = num_blocks
        self._ref_counts = [0] * (num_blocks + 1)
        self._content_of: dict[int, tuple[int, bytes]] = {}
        self._cached: list[dict[bytes, int]] = [{} for _ in range(num_groups)]
        self._diff = CacheDiff()
        # In the order of eviction.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks + 1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    @property
    def cached_hashes(self) -> KeysView[bytes]:
        """The hash of every content that `find` knows in the first group."""
        return self._cached[0].keys()

    def find(self, block_hash: bytes, group: int = 0) -> int | None:
        """The block that holds this content, used or free, or None."""
        return self._cached[group].get(block_hash)

    def is_free(self, block_id: int) -> bool:
        return block_id in self._free

    def is_shared(self, block_id: int) -> bool:
        return self._ref_counts[block_id] > 1

    def touch(self, block_ids: Iterable[int]) -> None:
        """Adds a reference to each block. Null blocks are skipped."""
        for block_id in block_ids:
            if block_id == NULL_BLOCK:
                continue
            if self._ref_counts[block_id] == 0:
                del self._free[block_id]
            self._ref_counts[block_id] += 1

    def allocate(self, count: int) -> list[int]:
        """`count` blocks with one reference each and no cached content. The caller has checked `num_free`."""
        assert count <= len(self._free), f"{count} blocks requested, {len(self._free)} are free"
        block_ids = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block_id in block_ids:
            self._ref_counts[block_id] = 1
            self.uncache(block_id)
        return block_ids

    def cache(self, block_id: int, block_hash: bytes, group: int = 0) -> None:
        """Makes a full block's content findable. Where another block already has this content, that one stays the one found."""
        cached = self._cached[group]
        if block_hash not in cached:
            cached[block_hash] = block_id
            self._content_of[block_id] = (group, block_hash)
            if group == 0:
                self._diff.store(block_hash)

    def uncache(self, block_id: int) -> None:
        """Forgets the block's content, because it is about to be overwritten. References stay as they are."""
        content = self._content_of.pop(block_id, None)
        if content is not None:
            group, block_hash = content
            del self._cached[group][block_hash]
            if group == 0:
                self._diff.evict(block_hash)

    def take_events(self) -> CacheEvents | None:
        """Which contents of the first group became findable and which were evicted since the last call; None without changes."""
        return self._diff.take()

    def release(self, block_ids: Iterable[int]) -> None:
        """Drops a reference to each block, in the order in which they may be evicted. Null blocks are skipped."""
        for block_id in block_ids:
            if block_id == NULL_BLOCK:
                continue
            self._ref_counts[block_id] -= 1
            assert self._ref_counts[block_id] >= 0, f"block {block_id} was released more often than touched"
            if self._ref_counts[block_id] == 0:
                self._free[block_id] = None
                if block_id not in self._content_of:
                    # Its content cannot be found again: use it before any cached block.
                    self._free.move_to_end(block_id, last=False)
