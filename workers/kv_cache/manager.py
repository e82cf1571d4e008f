"""Which KV blocks a sequence holds: prefix reuse, growth, rollback, and release of blocks that the sliding window has passed.

Knows sequences and the block pool; no requests, no scheduling policy, no torch. Where layers have different windows, each group of layers
has its own blocks of a sequence, which all come from one pool, and releases them by its own window: of a model with full attention in some
layers and a window in the others, only the former's blocks grow with the context.

Window arithmetic, with block_size 4 and W = 6: when the next query is position 11 it sees keys 6..11. Block 0 (tokens 0-3) is out of
sight for it and every later query and is released; block 1 (4-7) is still partly seen. In general block i is released when
(i + 1) * block_size <= next_query - W + 1, so a decoding sequence holds at most ceil((W - 1) / block_size) + 1 blocks.
"""

import bisect
import itertools
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from workers.kv_cache.block_pool import NULL_BLOCK, BlockPool
from workers.kv_cache.sequence import BlockSequence, BlockTable
from workers.protocol import hash_block


@dataclass(frozen=True, slots=True)
class Prefix:
    """Cached blocks from which a sequence can start. `block_ids`: `num_blocks` for each group of layers; those that its window has passed
    are null blocks.
    """

    num_blocks: int
    block_ids: Sequence[Sequence[int]]


class KVCacheManager:
    """Per sequence: `find_prefix`, `start`, then `commit` and `grow` in turn, one step each, and `free`.

    windows: of each group of layers, the widest first.
    """

    def __init__(
        self, *, num_blocks: int, block_size: int, windows: Sequence[int | None], enable_prefix_caching: bool
    ) -> None:
        self.pool = BlockPool(num_blocks, num_groups=len(windows))
        self.block_size = block_size
        self.windows = tuple(windows)
        self._has_window = any(window is not None for window in windows)
        self.enable_prefix_caching = enable_prefix_caching

    def find_prefix(self, sequence: BlockSequence, max_tokens: int) -> Prefix:
        """The longest run of cached blocks from which the sequence can start, of at most `max_tokens` tokens."""
        if not self.enable_prefix_caching:
            return Prefix(0, [[] for _ in self.windows])
        self._extend_hashes(sequence, max_tokens)
        hashes = sequence.block_hashes[: max_tokens // self.block_size]
        cached = [[self.pool.find(h, group) for h in hashes] for group in range(len(self.windows))]
        length, before = len(hashes), -1
        # What is the longest prefix for one group may be none for another: shorten it until all agree.
        while length != before:
            before = length
            for window, block_ids in zip(self.windows, cached, strict=True):
                length = self._longest_prefix(block_ids[:length], window)
        found = []
        for window, block_ids in zip(self.windows, cached, strict=True):
            first_seen = self._num_unseen_blocks(window, length * self.block_size)
            found.append([NULL_BLOCK] * first_seen + [b for b in block_ids[first_seen:length] if b is not None])
        return Prefix(length, found)

    def start(self, sequence: BlockSequence, prefix: Prefix, num_new_tokens: int) -> bool:
        """Gives a sequence its cached prefix and blocks for the next `num_new_tokens`; False, without effect, if too few are free."""
        pool = self.pool
        num_revived = sum(pool.is_free(b) for block_ids in prefix.block_ids for b in block_ids if b != NULL_BLOCK)
        num_computed = prefix.num_blocks * self.block_size
        num_needed = self._blocks_for(num_computed + num_new_tokens) - prefix.num_blocks
        if num_needed * len(self.windows) + num_revived > pool.num_free:
            return False
        # All of them first: a new block must not be one of the prefix's that were free.
        for block_ids in prefix.block_ids:
            pool.touch(block_ids)
        sequence.tables = [
            BlockTable(
                array("i", [*block_ids, *pool.allocate(num_needed)]), self._num_unseen_blocks(window, num_computed)
            )
            for window, block_ids in zip(self.windows, prefix.block_ids, strict=True)
        ]
        sequence.num_cached_blocks = prefix.num_blocks
        sequence.num_computed_tokens = num_computed
        return True

    def has_room(self, sequence: BlockSequence) -> bool:
        """Whether a running sequence can compute one more token without `grow`: its last block is not full, and there is no window."""
        return sequence.num_computed_tokens % self.block_size != 0 and not self._has_window

    def grow(self, sequence: BlockSequence, num_new_tokens: int) -> bool:
        """Makes room for the next tokens of a running sequence; False if too few blocks are free. Releases first what the window
        has passed.
        """
        tables = sequence.tables
        if self._has_window:
            for window, table in zip(self.windows, tables, strict=True):
                if window is not None:
                    self._release_unseen(table, window, sequence.num_computed_tokens)
        num_blocks = len(tables[0].block_ids)
        num_needed = self._blocks_for(sequence.num_computed_tokens + num_new_tokens) - num_blocks
        if num_needed <= 0:
            return True
        if num_needed * len(tables) > self.pool.num_free:
            return False
        for table in tables:
            table.block_ids.extend(self.pool.allocate(num_needed))
        return True

    def commit(self, sequence: BlockSequence, num_new_tokens: int) -> None:
        """After a step has computed `num_new_tokens`: blocks that became full can be found by other sequences."""
        sequence.num_computed_tokens += num_new_tokens
        num_full = sequence.num_computed_tokens // self.block_size
        if not self.enable_prefix_caching or num_full == sequence.num_cached_blocks:
            return
        self._extend_hashes(sequence, sequence.num_computed_tokens)
        for group, table in enumerate(sequence.tables):
            for i in range(sequence.num_cached_blocks, num_full):
                self.pool.cache(table.block_ids[i], sequence.block_hashes[i], group)
        sequence.num_cached_blocks = num_full

    def truncate(self, sequence: BlockSequence, num_tokens: int) -> None:
        """Between steps: drops the tokens from index `num_tokens` on, and their keys and values. Inverts appending and computing.

        Blocks after the new end are released. They keep their content, which stays true for sequences that contain it. A cached block
        that the new end cuts would be overwritten: it is taken out of the prefix cache or, when other sequences share it, given back,
        and the tokens before the cut in it are computed again. When everything that is left is computed, append a token before the
        next step, which otherwise has nothing to compute.

        Worked example, block_size 4: 10 tokens are computed in blocks [5, 3, 8], of which 5 and 3 are cached. Cut to 6 tokens, block 8
        is released and block 3 (tokens 4 and 5) is no longer cached: 6 tokens stay computed. Were 3 shared, it would be released
        too, and 4 tokens would stay computed.

        Raises ValueError where the window needs blocks that are released already. As many tokens as were computed before the last
        `grow` can always be kept, unless the block that the end cuts became shared since.
        """
        size, num_computed = self.block_size, min(sequence.num_computed_tokens, num_tokens)
        num_whole, num_partial = divmod(num_computed, size)
        cuts_a_cached_block = num_partial > 0 and num_whole < sequence.num_cached_blocks
        if cuts_a_cached_block and any(self.pool.is_shared(t.block_ids[num_whole]) for t in sequence.tables):
            num_computed, num_partial = num_whole * size, 0
        for window, table in zip(self.windows, sequence.tables, strict=False):
            if self._num_unseen_blocks(window, num_computed) < table.num_released_blocks:
                raise ValueError(
                    f"Cut to {num_tokens} tokens, the sequence needs blocks that the sliding window has released. Start it again."
                )
        num_kept = self._blocks_for(num_computed)
        self._release(sequence, from_block=num_kept)
        for table in sequence.tables:
            if cuts_a_cached_block and num_partial:
                self.pool.uncache(table.block_ids[num_whole])
            del table.block_ids[num_kept:]
        del sequence.token_ids[num_tokens:]
        del sequence.block_hashes[num_tokens // size :]
        sequence.num_cached_blocks = min(sequence.num_cached_blocks, num_whole)
        sequence.num_computed_tokens = num_computed

    def free(self, sequence: BlockSequence) -> None:
        """Releases all blocks; the tokens stay."""
        self._release(sequence, from_block=0)
        sequence.tables = []
        sequence.num_cached_blocks = 0
        sequence.num_computed_tokens = 0

    def max_blocks_held(self, num_tokens: int, max_new_tokens: int) -> int:
        """The most blocks a sequence of `num_tokens` ever holds when a step computes at most `max_new_tokens` of it."""
        total = 0
        for window in self.windows:
            whole = self._blocks_for(num_tokens)
            total += whole if window is None else min(self._blocks_for(window - 1 + max_new_tokens) + 1, whole)
        return total

    def longest_sequence(self, num_tokens: int, max_new_tokens: int) -> int:
        """`num_tokens`, or less where the cache cannot hold one sequence of as many; `max_new_tokens` as above."""
        if self.max_blocks_held(num_tokens, max_new_tokens) <= self.pool.num_blocks:
            return num_tokens
        too_long = bisect.bisect(
            range(self._blocks_for(num_tokens)),
            self.pool.num_blocks,
            key=lambda num_blocks: self.max_blocks_held(num_blocks * self.block_size, max_new_tokens),
        )
        return (too_long - 1) * self.block_size

    def _longest_prefix(self, cached: Sequence[int | None], window: int | None) -> int:
        """For one group: of how many blocks."""
        if window is None:
            return next((i for i, block_id in enumerate(cached) if block_id is None), len(cached))
        # With a window, a prefix of n blocks needs only those its next query sees: search the longest such n.
        best, last_missing = 0, -1
        for length, block_id in enumerate(cached, start=1):
            if block_id is None:
                last_missing = length - 1
            elif last_missing < self._num_unseen_blocks(window, length * self.block_size):
                best = length
        return best

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _num_unseen_blocks(self, window: int | None, next_query: int) -> int:
        return 0 if window is None else max(0, next_query - window + 1) // self.block_size

    def _release_unseen(self, table: BlockTable, window: int, next_query: int) -> None:
        num_unseen = self._num_unseen_blocks(window, next_query)
        unseen = table.block_ids[table.num_released_blocks : num_unseen]
        if unseen:
            self.pool.release(reversed(unseen))
            table.block_ids[table.num_released_blocks : num_unseen] = array("i", [NULL_BLOCK]) * len(unseen)
            table.num_released_blocks = num_unseen

    def _release(self, sequence: BlockSequence, *, from_block: int) -> None:
        """The tail is evicted before the head, which more prefixes share."""
        tails = [reversed(table.block_ids[from_block:]) for table in sequence.tables]
        self.pool.release(itertools.chain.from_iterable(zip(*tails, strict=True)))

    def _extend_hashes(self, sequence: BlockSequence, num_tokens: int) -> None:
        hashes, size = sequence.block_hashes, self.block_size
        for i in range(len(hashes), num_tokens // size):
            parent = hashes[-1] if hashes else sequence.root_hash
            hashes.append(hash_block(parent, sequence.token_ids[i * size : (i + 1) * size]))
