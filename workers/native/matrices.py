"""Packed weight matrices and their product with the compiled kernels of cpp/gemm/. Knows no layers and no checkpoints.

A row's result is bit for bit independent of the other rows. In float32 it is the same on every instruction set, but for AMX, which
computes weights that bfloat16 holds exactly in another order. In bfloat16 it is not: AVX-512 has an instruction for pairs, AMX one for
tiles. With weights in groups, only AMX differs in bfloat16.
"""

import ctypes
from collections.abc import Callable
from typing import Any, Literal

import torch

from workers.config import QUANTIZATION_GROUP_SIZE
from workers.native.huge_pages import prefer_huge_pages
from workers.native.library import NativeLibrary

PANEL = 32  # output columns that are packed together; the last panel is filled up with zeros
HEADER_BYTES = 64  # of a packed quantised matrix
DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_POINTERS = [ctypes.c_void_p] * 3
_PACK = [*_POINTERS[:2], ctypes.c_int64, ctypes.c_int64]
_PACK_FLOAT8 = [*_POINTERS, *[ctypes.c_int64] * 3]
_PACK_GROUPED = [*_POINTERS, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
_GEMM = [*_POINTERS, *[ctypes.c_int64] * 5]

Gemms = dict[torch.dtype, Callable[..., Any]]  # {dtype of the inputs and of the product: its kernel}


class PackedMatrix:
    """A weight [out_features, in_features] in the form that a kernel reads, as bytes in `packed`."""

    def __init__(
        self,
        packed: torch.Tensor,
        *,
        out_features: int,
        in_features: int,
        gemms: Gemms,
        gated_gemms: Gemms | None = None,
        wide_gemms: Gemms | None = None,
    ) -> None:
        """gated_gemms, wide_gemms: of `multiply_gated` and `multiply_wide`, if there are any for weights of this form."""
        self.packed = packed
        self.out_features = out_features
        self.in_features = in_features
        self._gemms = gemms
        # Gates and ups are in panels of their own.
        self._gated_gemms: Gemms = (gated_gemms or {}) if out_features % (2 * PANEL) == 0 else {}
        self._wide_gemms: Gemms = wide_gemms or {}

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """x @ weight.T. x: [num_tokens, in_features], rows of any stride -> [num_tokens, out_features] in the dtype of x."""
        out = x.new_empty((x.shape[0], self.out_features))
        self.multiply_into(out, x)
        return out

    def multiply_into(self, out: torch.Tensor, x: torch.Tensor) -> None:
        """The same. out: [num_tokens, out_features] in the dtype of x, rows of any stride."""
        assert x.shape[1] == self.in_features and x.stride(1) == 1 and out.stride(1) == 1
        if x.dtype not in self._gemms:  # float16: the sums are in float32 in any case
            out.copy_(self.multiply(x.float()))
            return
        self._run(self._gemms[x.dtype], out, x)

    def multiply_gated(self, x: torch.Tensor) -> torch.Tensor | None:
        """silu(gate) * up, where gates are the first half of the outputs and ups the second; None if there is no kernel for it. The bits
        are those of `multiply` and then of NativeLayerKernels.silu_mul.

        x: [num_tokens, in_features] -> [num_tokens, out_features / 2]
        """
        gemm = self._gated_gemms.get(x.dtype)
        if gemm is None:
            return None
        assert x.shape[1] == self.in_features and x.stride(1) == 1
        out = x.new_empty((x.shape[0], self.out_features // 2))
        self._run(gemm, out, x)
        return out

    def multiply_wide(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor | None:
        """`multiply` as float32, with the same numbers; None if there is no kernel for it. out: where it goes, [num_tokens, out_features]
        float32; None for new memory.
        """
        gemm = self._wide_gemms.get(x.dtype)
        if gemm is None:
            return None
        if out is None:
            out = x.new_empty((x.shape[0], self.out_features), dtype=torch.float32)
        assert x.shape[1] == self.in_features and x.stride(1) == 1 and out.dtype == torch.float32
        assert out.shape == (x.shape[0], self.out_features) and out.stride(1) == 1
        self._run(gemm, out, x)
        return out

    def _run(self, gemm: Callable[..., Any], out: torch.Tensor, x: torch.Tensor) -> None:
        gemm(
            out.data_ptr(),
            x.data_ptr(),
            self.packed.data_ptr(),
            x.shape[0],
            self.out_features,
            self.in_features,
            x.stride(0),
            out.stride(0),
        )


class Columns:
    """Takes columns of matrices, as x[:, inputs] does. inputs: [num_columns] int64."""

    def __init__(self, library: NativeLibrary, inputs: torch.Tensor) -> None:
        self.inputs = inputs.contiguous()
        self._kernels = {
            num_bytes: library.function(f"take_columns_{num_bytes}", [*_POINTERS, *[ctypes.c_int64] * 3])
            for num_bytes in (2, 4)
        }

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """x: [num_tokens, at least as many as the inputs name], rows of any stride."""
        assert x.stride(1) == 1
        out = x.new_empty((x.shape[0], len(self.inputs)))
        kernel = self._kernels[x.element_size()]
        kernel(out.data_ptr(), x.data_ptr(), self.inputs.data_ptr(), *out.shape, x.stride(0))
        return out


def packs(dtype: torch.dtype, *, in_features: int) -> bool:
    """Whether `pack_dense` takes this weight."""
    return dtype is torch.float32 or (dtype is torch.bfloat16 and in_features % 2 == 0)


def pack_dense(library: NativeLibrary, weight: torch.Tensor) -> PackedMatrix:
    """weight: [out_features, in_features], contiguous, which `packs`. In float32 it takes half of its bytes if bfloat16 holds it."""
    return _pack_narrow(library, weight) or _pack_as_it_is(library, weight)


def _pack_narrow(library: NativeLibrary, weight: torch.Tensor) -> PackedMatrix | None:
    out_features, in_features = weight.shape
    if weight.dtype is not torch.float32 or in_features % 2:
        return None
    packed = _new(_num_panels(out_features) * PANEL * in_features, torch.bfloat16)
    pack = library.function("pack_narrow_float32", _PACK, restype=ctypes.c_int64)
    if not pack(packed.data_ptr(), weight.data_ptr(), out_features, in_features):
        return None
    gemms = {torch.float32: library.function("gemm_narrow_float32", _GEMM)}
    return PackedMatrix(
        packed,
        out_features=out_features,
        in_features=in_features,
        gemms=gemms,
        gated_gemms={torch.float32: library.function("gated_gemm_narrow_float32", _GEMM)},
        wide_gemms=gemms,
    )


def _pack_as_it_is(library: NativeLibrary, weight: torch.Tensor) -> PackedMatrix:
    out_features, in_features = weight.shape
    name = DTYPE_NAMES[weight.dtype]
    packed = _new(_num_panels(out_features) * PANEL * in_features, weight.dtype)
    library.function(f"pack_{name}", _PACK)(packed.data_ptr(), weight.data_ptr(), out_features, in_features)
    gemms = {weight.dtype: library.function(f"gemm_{name}", _GEMM)}
    wide = "gemm_float32" if weight.dtype is torch.float32 else f"wide_gemm_{name}"
    return PackedMatrix(
        packed,
        out_features=out_features,
        in_features=in_features,
        gemms=gemms,
        gated_gemms={weight.dtype: library.function(f"gated_gemm_{name}", _GEMM)},
        wide_gemms={weight.dtype: library.function(wide, _GEMM)},
    )


def pack_grouped(
    library: NativeLibrary,
    values: torch.Tensor,
    scales: torch.Tensor,
    minima: torch.Tensor | None = None,
    *,
    num_bits: Literal[4, 8],
    zero_points: torch.Tensor | None = None,
) -> PackedMatrix:
    """values: [out_features, in_features] int8, -8 to 7 for 4 bits, 0 to 15 with minima or zero points; scales and one of minima and zero
    points: [out_features, in_features / 32], both float16 or both float32. All contiguous. Zero points only with 4 bits and float16.
    """
    assert minima is None or zero_points is None
    seconds = minima if zero_points is None else zero_points
    assert scales.dtype in (torch.float16, torch.float32) and (seconds is None or seconds.dtype is scales.dtype)
    out_features, in_features = values.shape
    header_bytes = scales.element_size() * (1 if seconds is None else 2)
    num_bytes = in_features * num_bits // 8 + in_features // QUANTIZATION_GROUP_SIZE * header_bytes
    packed = _new(HEADER_BYTES + _num_panels(out_features) * PANEL * num_bytes, torch.uint8)
    second = "_zeros" if zero_points is not None else "" if minima is None else "_minima"
    form = f"int{num_bits}{second}{'_wide' if scales.dtype is torch.float32 else ''}"
    pack = library.function(f"pack_{form}", _PACK_GROUPED)
    second_address = None if seconds is None else seconds.data_ptr()
    pack(packed.data_ptr(), values.data_ptr(), scales.data_ptr(), second_address, out_features, in_features)
    gemms = {dtype: library.function(f"gemm_{form}_{name}", _GEMM) for dtype, name in DTYPE_NAMES.items()}
    gated_gemms: Gemms = {}
    wide_gemms: Gemms = {}
    if form in ("int8", "int4"):
        gated_gemms = {
            dtype: library.function(f"gated_gemm_{form}_{name}", _GEMM) for dtype, name in DTYPE_NAMES.items()
        }
        wide = library.function(f"wide_gemm_{form}_bfloat16", _GEMM)
        wide_gemms = {torch.float32: gemms[torch.float32], torch.bfloat16: wide}
    return PackedMatrix(
        packed,
        out_features=out_features,
        in_features=in_features,
        gemms=gemms,
        gated_gemms=gated_gemms,
        wide_gemms=wide_gemms,
    )


def packs_float8(in_features: int, *, block_size: int) -> bool:
    """Whether `pack_float8` takes such a weight: the kernel reads pairs of inputs."""
    return in_features % 2 == 0 and (block_size % 2 == 0 or block_size >= in_features)


def pack_float8(library: NativeLibrary, values: torch.Tensor, scales: torch.Tensor, *, block_size: int) -> PackedMatrix:
    """values: [out_features, in_features] float8_e4m3fn; scales: [out_features, ceil(in_features / block_size)] float32. Contiguous.

    `packs_float8` has said yes.
    """
    out_features, in_features = values.shape
    assert scales.shape == (out_features, -(-in_features // block_size)) and scales.dtype is torch.float32
    num_panels, scale_bytes = _num_panels(out_features), PANEL * scales.element_size()
    panel_bytes = scales.shape[1] * scale_bytes + in_features * PANEL
    packed = _new(HEADER_BYTES + num_panels * panel_bytes, torch.uint8)
    pack = library.function("pack_float8", _PACK_FLOAT8)
    pack(
        packed.data_ptr(), values.data_ptr(), scales.data_ptr(), out_features, in_features, min(block_size, in_features)
    )
    gemms = {dtype: library.function(f"gemm_float8_{name}", _GEMM) for dtype, name in DTYPE_NAMES.items()}
    return PackedMatrix(packed, out_features=out_features, in_features=in_features, gemms=gemms)


def _new(size: int, dtype: torch.dtype) -> torch.Tensor:
    packed = torch.empty(size, dtype=dtype)
    prefer_huge_pages(packed)
    return packed


def _num_panels(out_features: int) -> int:
    return -(-out_features // PANEL)
