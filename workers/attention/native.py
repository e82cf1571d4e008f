"""Paged attention compiled for the CPU (native/attention.cpp). Reads keys and values where they lie in their blocks.

A query's result is bit for bit the same whatever else is computed in the step, however its context was cut into chunks, wherever its blocks
are, and on every instruction set. Float32 and bfloat16.
"""

import ctypes

import torch

from workers.attention.backend import AttentionMetadata
from workers.native.library import NativeLibrary
from workers.native.matrices import DTYPE_NAMES

_ATTENTION = [*[ctypes.c_void_p] * 7, *[ctypes.c_int64] * 9]


class NativeBackend:
    """See `AttentionBackend`. `sliding_window` counts the token itself; None is full causal attention."""

    name = "native"

    def __init__(
        self,
        library: NativeLibrary,
        *,
        dtype: torch.dtype,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        sliding_window: int | None,
    ) -> None:
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.window = sliding_window or 0
        self._kernel = library.function(f"attention_{DTYPE_NAMES[dtype]}", _ATTENTION)
        self._planned_for: AttentionMetadata | None = None
        self._lengths = torch.empty(0)

    def forward(
        self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, metadata: AttentionMetadata
    ) -> torch.Tensor:
        # q: [num_tokens, num_heads, head_dim]
        # Every layer of a step passes the same metadata.
        if self._planned_for is not metadata:
            self._lengths = torch.tensor([metadata.query_lens, metadata.context_lens])
            self._planned_for = metadata
        table = metadata.block_table
        assert table.stride(1) == 1 and q.stride(2) == 1 and q.stride(1) == self.head_dim
        out = torch.empty(q.shape, dtype=q.dtype)
        num_seqs = len(metadata.query_lens)
        self._kernel(
            out.data_ptr(),
            q.data_ptr(),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            table.data_ptr(),
            self._lengths.data_ptr(),
            self._lengths.data_ptr() + 8 * num_seqs,
            num_seqs,
            table.stride(0),
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
            k_cache.shape[1],
            self.window,
            q.stride(0),
            out.stride(0),
        )
        return out
