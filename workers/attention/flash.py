"""Paged attention on CUDA through `torch.nn.attention.varlen`: PyTorch's own FlashAttention, no extra kernel package.

The kernel reads keys and values in place, by block table, with GQA and the sliding window. One call serves prefill, chunked prefill and
decode, with static shapes and no host reads, so a step can be captured in a CUDA graph. FlashAttention 2's paged path accepts only block
sizes that are multiples of 256. It computes one split, so a query's result does not depend on the batch around it; whether a query has the
same bits decoded and prefilled is the library's choice of tiles.
"""

import inspect

import torch
from torch.nn.attention.varlen import varlen_attn

from workers.attention.backend import AttentionMetadata
from workers.kernels.quantized_kv import Cache

BLOCK_MULTIPLE = 256
MAX_HEAD_DIM = 256
MIN_CAPABILITY = (8, 0)
# torch 2.11 has `varlen_attn` without them.
NEEDED_ARGUMENTS = ("block_table", "seqused_k", "num_splits", "enable_gqa", "window_size")


def missing_arguments() -> list[str]:
    """What this release of torch lacks for paged attention."""
    return [name for name in NEEDED_ARGUMENTS if name not in inspect.signature(varlen_attn).parameters]


class FlashBackend:
    """See `AttentionBackend`. float16 and bfloat16 only, like the kernel."""

    name = "flash"

    def __init__(self, *, num_heads: int, num_kv_heads: int, head_dim: int, sliding_window: int | None) -> None:
        self.is_gqa = num_heads != num_kv_heads
        self.scale = head_dim**-0.5
        self.sliding_window = sliding_window

    def forward(self, q: torch.Tensor, k_cache: Cache, v_cache: Cache, metadata: AttentionMetadata) -> torch.Tensor:
        # q: [num_tokens, num_heads, head_dim]; caches: [num_blocks, block_size, num_kv_heads, head_dim]
        assert isinstance(k_cache, torch.Tensor) and isinstance(v_cache, torch.Tensor), "see select.flash_obstacle"
        out = varlen_attn(
            q,
            k_cache,
            v_cache,
            metadata.cu_seqlens_q,
            # Must be given; its values are not read where block_table and seqused_k are.
            metadata.cu_seqlens_q,
            metadata.max_query_len,
            metadata.max_seq_len,
            scale=self.scale,
            window_size=self.window_size(metadata.max_query_len),
            enable_gqa=self.is_gqa,
            seqused_k=metadata.seq_lens,
            block_table=metadata.block_table,
            # One split makes a sequence's result independent of the batch around it.
            num_splits=1,
        )
        assert isinstance(out, torch.Tensor), "varlen_attn returns a tuple only if the log-sum-exp is requested"
        return out

    def window_size(self, max_query_len: int) -> tuple[int, int]:
        """(left, right). The kernel's left window does not count the token itself, ours does."""
        if self.sliding_window is not None:
            return self.sliding_window - 1, 0
        # One query sees all keys. Only without a causal mask does the kernel pack the query heads of a KV head: with 32 query heads and 8
        # KV heads it reads the cache once, not four times.
        return (-1, -1) if max_query_len == 1 else (-1, 0)
