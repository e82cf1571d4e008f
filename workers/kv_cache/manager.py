"""Which KV blocks a request holds: growth, release behind the sliding window, prefix reuse.

Knows requests and the block pool; no policy about who runs, no torch.

Window arithmetic, with block_size 4 and W = 6: when the next query is position 11 it sees keys 6..11. Block 0 (tokens
0-3) is out of sight for it and every later query and is released; block 1 (4-7) is still partly seen. In general block
i is released when (i + 1) * block_size <= next_query - W + 1, so a decoding sequence holds at most ceil((W - 1) /
block_size) + 1 blocks.
"""

from workers.engine.request import Request
from workers.kv_cache.block_pool import NULL_BLOCK, BlockPool
from workers.protocol import hash_block


class KVCacheManager:
    def __init__(
        self, *, num_blocks: int, block_size: int, sliding_window: int | None, enable_prefix_caching: bool
    ) -> None:
        self.pool = BlockPool(num_blocks)
        self.block_size = block_size
        self.sliding_window = sliding_window
        self.enable_prefix_caching = enable_prefix_caching
        self.prefix_queries_total = 0
        self.prefix_hits_total = 0
        # Of those, for background requests.
        self.background_prefix_queries_total = 0
        self.background_prefix_hits_total = 0

    def find_prefix(self, request: Request) -> list[int]:
        """The longest run of cached blocks the request can start from, null blocks where the window makes one needless.

        At most `request.max_prefix_tokens`: what must be computed is not looked for.
        """
        if not self.enable_prefix_caching:
            return []
        self._extend_hashes(request, request.max_prefix_tokens)
        cached = [self.pool.find(h) for h in request.block_hashes[: request.max_prefix_tokens // self.block_size]]
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

    def start(self, request: Request, prefix: list[int], num_new_tokens: int) -> bool:
        """Gives a waiting request its cached prefix and blocks for its first tokens; False if there are too few."""
        num_revived = sum(self.pool.is_free(b) for b in prefix if b != NULL_BLOCK)
        num_computed = len(prefix) * self.block_size
        num_needed = self._blocks_for(num_computed + num_new_tokens) - len(prefix)
        if num_needed + num_revived > self.pool.num_free:
            return False
        self.pool.hold(prefix)
        request.block_ids = prefix + self.pool.allocate(num_needed)
        request.num_released_blocks = self._num_unseen_blocks(num_computed)
        request.num_named_blocks = len(prefix)
        request.num_computed_tokens = num_computed
        if request.num_preemptions == 0:
            request.num_cached_tokens = min(num_computed, request.num_prompt_tokens)
            if self.enable_prefix_caching:
                self.prefix_queries_total += request.num_prompt_tokens
                self.prefix_hits_total += request.num_cached_tokens
                if request.is_background:
                    self.background_prefix_queries_total += request.num_prompt_tokens
                    self.background_prefix_hits_total += request.num_cached_tokens
        return True

    def grow(self, request: Request, num_new_tokens: int) -> bool:
        """Makes room for the next tokens of a running request, first releasing what the window has passed."""
        self._release_unseen(request)
        num_needed = self._blocks_for(request.num_computed_tokens + num_new_tokens) - len(request.block_ids)
        if num_needed > self.pool.num_free:
            return False
        if num_needed > 0:
            request.block_ids += self.pool.allocate(num_needed)
        return True

    def commit(self, request: Request) -> None:
        """After a step: full blocks get their names, so that others can find them."""
        if not self.enable_prefix_caching:
            return
        self._extend_hashes(request, request.num_computed_tokens)
        num_full = request.num_computed_tokens // self.block_size
        for i in range(request.num_named_blocks, num_full):
            self.pool.name(request.block_ids[i], request.block_hashes[i])
        request.num_named_blocks = num_full

    def free(self, request: Request) -> None:
        """Lets go of everything. The tail is evicted before the head, which more prefixes share."""
        self.pool.release(reversed(request.block_ids))
        request.block_ids = []
        request.num_released_blocks = request.num_named_blocks = 0
        request.num_computed_tokens = 0

    def max_blocks_held(self, num_tokens: int, max_new_tokens: int) -> int:
        """The most blocks a sequence of `num_tokens` ever holds when at most `max_new_tokens` are computed in a
        step.
        """
        if self.sliding_window is None:
            return self._blocks_for(num_tokens)
        in_sight = self._blocks_for(self.sliding_window - 1 + max_new_tokens) + 1
        return min(in_sight, self._blocks_for(num_tokens))

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _num_unseen_blocks(self, next_query: int) -> int:
        if self.sliding_window is None:
            return 0
        return max(0, next_query - self.sliding_window + 1) // self.block_size

    def _release_unseen(self, request: Request) -> None:
        num_unseen = self._num_unseen_blocks(request.num_computed_tokens)
        unseen = request.block_ids[request.num_released_blocks : num_unseen]
        if unseen:
            self.pool.release(reversed(unseen))
            request.block_ids[request.num_released_blocks : num_unseen] = [NULL_BLOCK] * len(unseen)
            request.num_released_blocks = num_unseen

    def _extend_hashes(self, request: Request, num_tokens: int) -> None:
        hashes, size = request.block_hashes, self.block_size
        for i in range(len(hashes), num_tokens // size):
            parent = hashes[-1] if hashes else b""
            hashes.append(hash_block(parent, request.token_ids[i * size : (i + 1) * size]))
