"""Which KV blocks a sequence holds: prefix reuse, growth, rollback, and release of blocks that the sliding window has passed.

Knows sequences and the block pool; no requests, no scheduling policy, no torch.

Window arithmetic, with block_size 4 and W = 6: when the next query is position 11 it sees keys 6..11. Block 0 (tokens 0-3) is out of
sight for it and every later query and is released; block 1 (4-7) is still partly seen. In general block i is released when
(i + 1) * block_size <= next_query - W + 1, so a decoding sequence holds at most ceil((W - 1) / block_size) + 1 blocks.
"""

from array import array

from workers.kv_cache.block_pool import NULL_BLOCK, BlockPool
from workers.kv_cache.sequence import BlockSequence
from workers.protocol import hash_block


class KVCacheManager:
    """Per sequence: `find_prefix`, `start`, then `commit` and `grow` in turn, one step each, and `free`."""

    def __init__(
        self, *, num_blocks: int, block_size: int, sliding_window: int | None, enable_prefix_caching: bool
    ) -> None:
        self.pool = BlockPool(num_blocks)
        self.block_size = block_size
        self.sliding_window = sliding_window
        self.enable_prefix_caching = enable_prefix_caching

    def find_prefix(self, sequence: BlockSequence, max_tokens: int) -> list[int]:
        """The longest run of cached blocks from which the sequence can start, of at most `max_tokens` tokens.

        Blocks that the window has passed are null blocks.
        """
        if not self.enable_prefix_caching:
            return []
        self._extend_hashes(sequence, max_tokens)
        cached = [self.pool.find(h) for h in sequence.block_hashes[: max_tokens // self.block_size]]
        if self.sliding_window is None:
            length = next((i for i, block_id in enumerate(cached) if block_id is None), len(cached))
            return [block_id for block_id in cached[:length] if block_id is not None]
        # With a window, a prefix of n blocks needs only those its next query sees: search the longest such n.
        best, last_missing = 0, -1
        for length, block_id in enumerate(cached, start=1):
            if block_id is None:
                last_missing = length - 1
            elif last_missing < self._num_unseen_blocks(length * self.block_size):
                best = length
        first_seen = self._num_unseen_blocks(best * self.block_size)
        return [NULL_BLOCK] * first_seen + [b for b in cached[first_seen:best] if b is not None]

    def start(self, sequence: BlockSequence, prefix: list[int], num_new_tokens: int) -> bool:
        """Gives a sequence its cached prefix and blocks for the next `num_new_tokens`; False, without effect, if too few are free."""
        num_revived = sum(self.pool.is_free(b) for b in prefix if b != NULL_BLOCK)
        num_computed = len(prefix) * self.block_size
        num_needed = self._blocks_for(num_computed + num_new_tokens) - len(prefix)
        if num_needed + num_revived > self.pool.num_free:
            return False
        self.pool.touch(prefix)
        sequence.block_ids = array("i", prefix + self.pool.allocate(num_needed))
        sequence.num_released_blocks = self._num_unseen_blocks(num_computed)
        sequence.num_cached_blocks = len(prefix)
        sequence.num_computed_tokens = num_computed
        return True

    def grow(self, sequence: BlockSequence, num_new_tokens: int) -> bool:
        """Makes room for the next tokens of a running sequence; False if too few blocks are free. Releases first what the window
        has passed.
        """
        if self.sliding_window is not None:
            self._release_unseen(sequence)
        num_needed = self._blocks_for(sequence.num_computed_tokens + num_new_tokens) - len(sequence.block_ids)
        if num_needed > self.pool.num_free:
            return False
        if num_needed > 0:
            sequence.block_ids.extend(self.pool.allocate(num_needed))
        return True

    def commit(self, sequence: BlockSequence, num_new_tokens: int) -> None:
        """After a step has computed `num_new_tokens`: blocks that became full can be found by other sequences."""
        sequence.num_computed_tokens += num_new_tokens
        if not self.enable_prefix_caching:
            return
        self._extend_hashes(sequence, sequence.num_computed_tokens)
        num_full = sequence.num_computed_tokens // self.block_size
        for i in range(sequence.num_cached_blocks, num_full):
            self.pool.cache(sequence.block_ids[i], sequence.block_hashes[i])
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
        if cuts_a_cached_block and self.pool.is_shared(sequence.block_ids[num_whole]):
            num_computed, num_partial = num_whole * size, 0
        if self._num_unseen_blocks(num_computed) < sequence.num_released_blocks:
            raise ValueError(
                f"Cut to {num_tokens} tokens, the sequence needs blocks that the sliding window has released. Start it again."
            )
        num_kept = self._blocks_for(num_computed)
        self.pool.release(reversed(sequence.block_ids[num_kept:]))
        if cuts_a_cached_block and num_partial:
            self.pool.uncache(sequence.block_ids[num_whole])
        del sequence.token_ids[num_tokens:]
        del sequence.block_ids[num_kept:]
        del sequence.block_hashes[num_tokens // size :]
        sequence.num_cached_blocks = min(sequence.num_cached_blocks, num_whole)
        sequence.num_computed_tokens = num_computed

    def free(self, sequence: BlockSequence) -> None:
        """Releases all blocks; the tokens stay. The tail is evicted before the head, which more prefixes share."""
        self.pool.release(reversed(sequence.block_ids))
        sequence.block_ids = array("i")
        sequence.num_released_blocks = sequence.num_cached_blocks = 0
        sequence.num_computed_tokens = 0

    def max_blocks_held(self, num_tokens: int, max_new_tokens: int) -> int:
        """The most blocks a sequence of `num_tokens` ever holds when a step computes at most `max_new_tokens` of it."""
        if self.sliding_window is None:
            return self._blocks_for(num_tokens)
        in_sight = self._blocks_for(self.sliding_window - 1 + max_new_tokens) + 1
        return min(in_sight, self._blocks_for(num_tokens))

    def longest_sequence(self, num_tokens: int, max_new_tokens: int) -> int:
        """`num_tokens`, or less where the cache cannot hold one sequence of as many; `max_new_tokens` as above."""
        if self.max_blocks_held(num_tokens, max_new_tokens) <= self.pool.num_blocks:
            return num_tokens
        return self.pool.num_blocks * self.block_size

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _num_unseen_blocks(self, next_query: int) -> int:
        if self.sliding_window is None:
            return 0
        return max(0, next_query - self.sliding_window + 1) // self.block_size

    def _release_unseen(self, sequence: BlockSequence) -> None:
        num_unseen = self._num_unseen_blocks(sequence.num_computed_tokens)
        unseen = sequence.block_ids[sequence.num_released_blocks : num_unseen]
        if unseen:
            self.pool.release(reversed(unseen))
            sequence.block_ids[sequence.num_released_blocks : num_unseen] = array("i", [NULL_BLOCK]) * len(unseen)
            sequence.num_released_blocks = num_unseen

    def _extend_hashes(self, sequence: BlockSequence, num_tokens: int) -> None:
        hashes, size = sequence.block_hashes, self.block_size
        for i in range(len(hashes), num_tokens // size):
            parent = hashes[-1] if hashes else sequence.root_hash
            hashes.append(hash_block(parent, sequence.token_ids[i * size : (i + 1) * size]))
