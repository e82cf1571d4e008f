"""Paged attention on CUDA through `torch.nn.attention.varlen`: PyTorch's own FlashAttention, no extra kernel package.

The kernel reads keys and values in place, by block table, with GQA and the sliding window. One call serves prefill, chunked prefill and
decode, with static shapes and no host reads, so a step can be captured in a CUDA graph. FlashAttention 2's paged path accepts only block
sizes that are multiples of 256, hence the default block size on CUDA. A stream that continues on another replica keeps its seed and its
tokens so far on CUDA, but not the last bits of its logits: attention asks for one split, but cuBLAS still chooses its products by the
number of rows.
"""

import torch
from torch.nn.attention.varlen import varlen_attn

from workers.attention.backend import AttentionMetadata
from workers.attention.sdpa import store_kv


class FlashBackend:
    """See `AttentionBackend`. float16 and bfloat16 only, like the kernel."""

    name = "flash"

    def __init__(self, *, num_heads: int, num_kv_heads: int, head_dim: int, sliding_window: int | None) -> None:
        self.is_gqa = num_heads != num_kv_heads
        self.scale = head_dim**-0.5
        # The kernel's left window does not count the token itself, ours does.
        self.window = (-1 if sliding_window is None else sliding_window - 1, 0)

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        # q: [num_tokens, num_heads, head_dim]; caches: [num_blocks, block_size, num_kv_heads, head_dim]
        store_kv(k, v, k_cache, v_cache, metadata.slot_mapping)
        out = varlen_attn(
            q,
            k_cache,
            v_cache,
            metadata.cu_seqlens_q,
            None,
            metadata.max_query_len,
            metadata.max_seq_len,
            scale=self.scale,
            window_size=self.window,
            enable_gqa=self.is_gqa,
            seqused_k=metadata.seq_lens,
            block_table=metadata.block_table,
            # One split makes a sequence's result independent of the batch around it.
            num_splits=1,
        )
        assert isinstance(out, torch.Tensor), "varlen_attn returns a tuple only if the log-sum-exp is requested"
        return out
