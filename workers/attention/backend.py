"""The one signature every attention backend has, and the metadata of one step.

Semantics, the same in prefill, chunked prefill and decode: the query at position q sees keys k with 0 <= q - k < W,
where W is the sliding window (it counts the token itself) or infinity. `sdpa.py` is the specification; every kernel is
tested against it. Each backend's own file says what it promises about the last bits of its results.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from workers.kernels.quantized_kv import Cache

# Per layer (k_cache, v_cache).
KVCaches = list[tuple[Cache, Cache]]


@dataclass(frozen=True, kw_only=True)
class AttentionMetadata:
    """Which tokens of the flat batch belong to which sequence, and where its keys and values live.

    The batch lays sequences end to end. With block_size 4, sequence A decoding its token 5 and sequence B prefilling
    tokens 0 to 2 give:
        query_lens   [1, 3]          cu_seqlens_q [0, 1, 4]       seq_lens [6, 3]      (computed before + new)
        block_table  [[7, 2], [5, 0]]          A's tokens 0-3 are in block 7, 4-5 in block 2
        slot_mapping [2*4+1, 5*4+0, 5*4+1, 5*4+2] = [9, 20, 21, 22]
    Block 0 is the null block: it replaces blocks that the window has passed, and pads rows; no query ever sees it.

    Tensors are int32 on the model's device except slot_mapping, int64. The Python numbers are known on the host without
    reading the device.
    """

    slot_mapping: torch.Tensor  # [num_tokens]
    block_table: torch.Tensor  # [num_seqs, max_blocks]
    seq_lens: torch.Tensor  # [num_seqs]
    cu_seqlens_q: torch.Tensor  # [num_seqs + 1]
    query_lens: list[int]
    context_lens: list[int]  # seq_lens on the host
    max_query_len: int
    max_seq_len: int


# For each group of layers: the same batch, in the group's own blocks.
StepMetadata = Sequence[AttentionMetadata]


class AttentionBackend(Protocol):
    name: str

    def forward(self, q: torch.Tensor, k_cache: Cache, v_cache: Cache, metadata: AttentionMetadata) -> torch.Tensor:
        """Attends to the keys and values in the caches; the layer has stored the step's own there.

        q: [num_tokens, num_heads, head_dim]; k_cache, v_cache: [num_blocks, block_size, num_kv_heads, head_dim], also in 8 bits
        where the backend can read them: see select.py.
        Returns [num_tokens, num_heads, head_dim].
        """
        ...
