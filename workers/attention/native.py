"""Paged attention compiled for the CPU (native/cpp/attention/). Reads keys and values where they lie in their blocks.

A query's result is bit for bit the same whatever else is computed in the step, however its context was cut into chunks, and wherever its
blocks are; in float32 it is also the same on every instruction set. For float32 and bfloat16, with keys and values in the same type or in
8 bits.
"""

import ctypes

import torch

from workers.attention.backend import AttentionMetadata
from workers.kernels.layers.native_layers import kv_kernel_names, pointers
from workers.kernels.quantized_kv import Cache
from workers.native.library import NativeLibrary

_ATTENTION = [*[ctypes.c_void_p] * 9, *[ctypes.c_int64] * 9]


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
        self._kernels = {
            kv_dtype: library.function(f"attention_{name}", _ATTENTION)
            for kv_dtype, name in kv_kernel_names(dtype).items()
        }

    def forward(self, q: torch.Tensor, k_cache: Cache, v_cache: Cache, metadata: AttentionMetadata) -> torch.Tensor:
        # q: [num_tokens, num_heads, head_dim]
        table = metadata.block_table
        assert table.stride(1) == 1 and q.stride(2) == 1 and q.stride(1) == self.head_dim
        out = torch.empty(q.shape, dtype=q.dtype)
        self._kernels[k_cache.dtype](
            out.data_ptr(),
            q.data_ptr(),
            *pointers(k_cache),
            *pointers(v_cache),
            table.data_ptr(),
            metadata.cu_seqlens_q.data_ptr(),
            metadata.seq_lens.data_ptr(),
            len(metadata.query_lens),
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
