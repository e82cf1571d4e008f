"""One sequence of tokens and the KV blocks that hold it. Only values: `manager.py` changes them.

Knows no request, no priority and no torch.
"""

from array import array
from dataclasses import dataclass, field


@dataclass(slots=True)
class BlockTable:
    """The blocks of a sequence in one group of layers, in the order of its tokens."""

    # 32-bit, as a step's block table has them: a row of it is then one copy, whatever the length of the context.
    block_ids: "array[int]"
    # Leading block_ids that are the null block, because the window has passed them.
    num_released_blocks: int = 0


@dataclass(eq=False, slots=True)
class BlockSequence:
    """The KV cache holds the keys and values of the first `num_computed_tokens` of `token_ids`.

    `root_hash`: the parent of the first block's hash, see `protocol.root_hash`. Sequences with different roots share no blocks.
    `tables`: one for each group of layers while the sequence is started, all of the same length; none otherwise.
    """

    token_ids: list[int]
    root_hash: bytes = b""
    num_computed_tokens: int = 0
    tables: list[BlockTable] = field(default_factory=list)
    # Leading blocks whose content the pool can find by hash, in every group.
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
    def block_ids(self) -> "array[int]":
        """Of the first group of layers, whose window is the widest."""
        return self.tables[0].block_ids if self.tables else array("i")

    @property
    def num_held_blocks(self) -> int:
        return sum(len(table.block_ids) - table.num_released_blocks for table in self.tables)
