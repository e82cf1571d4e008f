"""The layers' kernels compiled for the CPU (native/layer.cpp): one call each. Shapes and rounding: see `layer_specification`.

A row's result is bit for bit independent of the other rows, and the same on every instruction set.
"""

import ctypes

import torch

from workers.native.library import NativeLibrary
from workers.native.matrices import DTYPE_NAMES

_NORM = [*[ctypes.c_void_p] * 5, ctypes.c_int64, ctypes.c_int64, ctypes.c_float]
_ROTARY = [*[ctypes.c_void_p] * 7, *[ctypes.c_int64] * 5]
_SILU = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]


class NativeLayerKernels:
    """See `LayerKernels`. dtype: float32 or bfloat16, of all tensors but the angles."""

    def __init__(self, library: NativeLibrary, dtype: torch.dtype) -> None:
        name = DTYPE_NAMES[dtype]
        self._add_rms_norm = library.function(f"add_rms_norm_{name}", _NORM)
        self._rotary_kv = library.function(f"rotary_kv_{name}", _ROTARY)
        self._silu_mul = library.function(f"silu_mul_{name}", _SILU)

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
        kv_cache: tuple[torch.Tensor, torch.Tensor],
        slot_mapping: torch.Tensor,
    ) -> torch.Tensor:
        num_kv_heads, head_dim = kv_cache[0].shape[2:]
        num_tokens, num_all_heads, _ = qkv.shape
        num_heads = num_all_heads - 2 * num_kv_heads
        qkv = qkv.contiguous()
        q = qkv.new_empty((num_tokens, num_heads, head_dim))
        cos, sin = angles
        self._rotary_kv(
            q.data_ptr(),
            kv_cache[0].data_ptr(),
            kv_cache[1].data_ptr(),
            qkv.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            slot_mapping.data_ptr(),
            num_tokens,
            num_heads,
            num_kv_heads,
            head_dim,
            cos.stride(0),
        )
        return q

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        num_tokens, width = gate_up.shape
        gate_up = gate_up.contiguous()
        out = gate_up.new_empty((num_tokens, width // 2))
        self._silu_mul(out.data_ptr(), gate_up.data_ptr(), num_tokens, width // 2)
        return out
