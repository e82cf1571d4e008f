"""The names of a prompt's full KV blocks, computed without holding up the event loop.

Knows tokens and block sizes only. A 32k-token prompt in blocks of 16 is 2,000 hashes, a few milliseconds: others get their turn in between.
"""

import asyncio

from cluster.router.stream import Stream
from workers.protocol import hash_block

BLOCKS_AT_A_TIME = 256


class Hashing:
    """For the sequences of one admission: those of one prompt share the work."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._prompt: list[int] | None = None
        self._hashes: list[bytes] = []

    async def extend(self, stream: Stream, block_size: int) -> None:
        """Names every full block but one that ends with the last token, which is always computed."""
        num_blocks = (stream.num_tokens - 1) // block_size
        if len(stream.block_hashes) >= num_blocks:
            return
        prompt = stream.request.prompt_token_ids
        async with self._lock:
            if self._prompt is prompt and not stream.block_hashes:
                stream.block_hashes = self._hashes[:num_blocks]
            await _extend(stream.block_hashes, stream.token_ids(), block_size, num_blocks)
            if not stream.output_token_ids:
                self._prompt, self._hashes = prompt, stream.block_hashes


async def _extend(hashes: list[bytes], token_ids: list[int], block_size: int, num_blocks: int) -> None:
    for i in range(len(hashes), num_blocks):
        if i % BLOCKS_AT_A_TIME == BLOCKS_AT_A_TIME - 1:
            await asyncio.sleep(0)
        hashes.append(hash_block(hashes[-1] if hashes else b"", token_ids[i * block_size : (i + 1) * block_size]))
