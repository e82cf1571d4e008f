"""Hashes the full KV blocks of a prompt without blocking the event loop.

Knows tokens, block sizes and the adapter's name. A 32k-token prompt in blocks of 16 has 2,000 hashes, a few milliseconds of work, so the
loop yields to other tasks in between. The engine computes the same hashes, from the same root.
"""

import asyncio

from cluster.router.stream import Stream
from workers.protocol import hash_block, root_hash

BLOCKS_AT_A_TIME = 256


class Hashing:
    """For the sequences of one admission. Sequences with the same prompt and adapter share the work."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._prompt: list[int] | None = None
        self._root: bytes | None = None
        self._hashes: list[bytes] = []

    async def extend(self, stream: Stream, block_size: int) -> None:
        """Hashes every full block, except a block that ends with the last token: that one is always computed."""
        num_blocks = (stream.num_tokens - 1) // block_size
        if len(stream.block_hashes) >= num_blocks:
            return
        prompt, root = stream.request.prompt_token_ids, root_hash(stream.request.adapter)
        async with self._lock:
            if self._prompt is prompt and self._root == root and not stream.block_hashes:
                stream.block_hashes = self._hashes[:num_blocks]
            await _extend(stream.block_hashes, stream.token_ids(), block_size, num_blocks, root=root)
            if not stream.output_token_ids:
                self._prompt, self._root, self._hashes = prompt, root, stream.block_hashes


async def _extend(hashes: list[bytes], token_ids: list[int], block_size: int, num_blocks: int, *, root: bytes) -> None:
    for i in range(len(hashes), num_blocks):
        if i % BLOCKS_AT_A_TIME == BLOCKS_AT_A_TIME - 1:
            await asyncio.sleep(0)
        hashes.append(hash_block(hashes[-1] if hashes else root, token_ids[i * block_size : (i + 1) * block_size]))
