"""The layers' kernels compiled for the CPU (native/cpp/layer.cpp): one call each. Shapes and rounding: see `layer_specification`.

A row's result is bit for bit independent of the other rows, and the same on every instruction set.
"""

import ctypes

import torch

from workers.kernels.quantized_kv import KV_DTYPES, Cache
from workers.native.library import NativeLibrary
from workers.native.matrices import DTYPE_NAMES

_LOOKUP = [*[ctypes.c_void_p] * 3, *[ctypes.c_int64] * 4]
_NORM = [*[ctypes.c_void_p] * 5, ctypes.c_int64, ctypes.c_int64, ctypes.c_float]
_ROTARY = [*[ctypes.c_void_p] * 9, *[ctypes.c_int64] * 6]
_SILU = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]


def kv_kernel_names(dtype: torch.dtype) -> dict[torch.dtype, str]:
    """How the names of kernels that read or write a KV cache end, by the dtype of its values. dtype: of the model."""
    name = DTYPE_NAMES[dtype]
    return {dtype: name, **{kv_dtype: f"{name}_{kv_name}" for kv_name, kv_dtype in KV_DTYPES.items()}}


def pointers(cache: Cache) -> tuple[int, int | None]:
    """Where its values and its scales begin."""
    if isinstance(cache, torch.Tensor):
        return cache.data_ptr(), None
    return cache.values.data_ptr(), cache.scales.data_ptr()


class NativeLayerKernels:
    """See `LayerKernels`. dtype: float32 or bfloat16, of all tensors but the angles and a KV cache in 8 bits."""

    def __init__(self, library: NativeLibrary, dtype: torch.dtype) -> None:
        name = DTYPE_NAMES[dtype]
        self._lookup = library.function("gather_rows", _LOOKUP)
        self._add_rms_norm = library.function(f"add_rms_norm_{name}", _NORM)
        self._rotary_kv = {
            kv_dtype: library.function(f"rotary_kv_{kernel}", _ROTARY)
            for kv_dtype, kernel in kv_kernel_names(dtype).items()
        }
        self._silu_mul = library.function(f"silu_mul_{name}", _SILU)

    def lookup_rows(self, table: torch.Tensor, indices: torch.Tensor, *, first: int = 0) -> torch.Tensor:
        num_rows, size = table.shape
        table, indices = table.contiguous(), indices.contiguous()
        out = table.new_empty((len(indices), size))
        row_bytes = size * table.element_size()
        self._lookup(out.data_ptr(), table.data_ptr(), indices.data_ptr(), len(indices), row_bytes, first, num_rows)
        return out

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor | None, *, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        num_tokens, hidden_size = x.shape
        x = x.contiguous()
        residual = None if residual is None else residual.contiguous()
        normed = torch.empty_like(x)
        total = x if residual is None else torch.empty_like(x)
        self._add_rms_norm(
            normed.data_ptr(),
            total.data_ptr(),
            x.data_ptr(),
            None if residual is None else residual.data_ptr(),
            weight.data_ptr(),
            num_tokens,
            hidden_size,
            eps,
        )
        return normed, total

    def rotary_kv(
        self,
        qkv: torch.Tensor,
        angles: tuple[torch.Tensor, torch.Tensor],
        *,
        kv_cache: tuple[Cache, Cache],
        slot_mapping: torch.Tensor,
    ) -> torch.Tensor:
        keys, values = kv_cache
        _, block_size, num_kv_heads, head_dim = keys.shape
        num_tokens, num_all_heads, _ = qkv.shape
        num_heads = num_all_heads - 2 * num_kv_heads
        qkv = qkv.contiguous()
        q = qkv.new_empty((num_tokens, num_heads, head_dim))
        cos, sin = angles
        self._rotary_kv[keys.dtype](
            q.data_ptr(),
            *pointers(keys),
            *pointers(values),
            qkv.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            slot_mapping.data_ptr(),
            num_tokens,
            num_heads,
            num_kv_heads,
            head_dim,
            block_size,
            cos.stride(0),
        )
        return q

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        num_tokens, width = gate_up.shape
        gate_up = gate_up.contiguous()
        out = gate_up.new_empty((num_tokens, width // 2))
        self._silu_mul(out.data_ptr(), gate_up.data_ptr(), num_tokens, width // 2)
        return out
