"""One sequence of tokens and the KV blocks that hold it. Only values: `manager.py` changes them.

Knows no request, no priority and no torch.
"""

from array import array
from dataclasses import dataclass, field


@dataclass(eq=False, slots=True)
class BlockSequence:
    """The KV cache holds the keys and values of the first `num_computed_tokens` of `token_ids`.

    `root_hash`: the parent of the first block's hash, see `protocol.root_hash`. Sequences with different roots share no blocks.
    """

    token_ids: list[int]
    root_hash: bytes = b""
    num_computed_tokens: int = 0
    # 32-bit, as a step's block table has them: a row of it is then one copy, whatever the length of the context.
    block_ids: "array[int]" = field(default_factory=lambda: array("i"))
    # Leading block_ids that are the null block, because the window has passed them.
    num_released_blocks: int = 0
    # Leading block_ids whose content the pool can find by hash.
    num_cached_blocks: int = 0
    # Of the leading full blocks of token_ids, as far as they are known.
    block_hashes: list[bytes] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_pending_tokens(self) -> int:
        """Tokens that are still to be computed."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def num_held_blocks(self) -> int:
        return len(self.block_ids) - self.num_released_blocks
