"""What stored values become on a CPU: packed for the compiled kernels where there are any, else for torch.

Knows which forms compute as they are and which become dense; no layers and no files.
"""

from dataclasses import replace

import torch
from torch import nn

from workers.config import QUANTIZATION_GROUP_SIZE
from workers.native.library import NativeLibrary
from workers.native.matrices import (
    Columns,
    PackedMatrix,
    pack_dense,
    pack_float8,
    pack_grouped,
    packs,
    packs_float8,
)
from workers.quant.dense import linear, pack
from workers.quant.grouped import multiply
from workers.quant.quantized import Float8Tensor, QuantizedTensor, StoredValues, dense_values
from workers.quant.stored import Matrix, Pack, note_input_scale


def cpu_pack(library: NativeLibrary | None) -> Pack:
    """library: the compiled kernels, None without."""

    def pack_values(values: StoredValues, dtype: torch.dtype, device: torch.device) -> Matrix:
        if isinstance(values, Float8Tensor):
            return note_input_scale(_float8(values, dtype, library), values, is_used=False)
        if not isinstance(values, QuantizedTensor) or values.group_size % QUANTIZATION_GROUP_SIZE:
            return _dense(dense_values(values).to(dtype), library)
        matrix = _grouped(values.regroup(QUANTIZATION_GROUP_SIZE), library)
        return matrix if values.inputs is None else _Reordered(matrix, values.inputs, library)

    return pack_values


class _Packed:
    """A matrix of the compiled kernels."""

    def __init__(self, matrix: PackedMatrix, *, is_dense: bool = False) -> None:
        self.tensors = (matrix.packed,)
        self.multiply = matrix.multiply
        self.multiply_into = matrix.multiply_into
        self.out_features = matrix.out_features
        self.is_dense = is_dense


class _Dense:
    is_dense = True

    def __init__(self, weight: torch.Tensor) -> None:
        self.tensors = (pack(nn.Parameter(weight, requires_grad=False)),)

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.tensors[0])


class _Specification:
    """The kernels' bits, in torch."""

    def __init__(self, parts: "_Parts") -> None:
        self.parts = parts
        self.tensors = parts.tensors

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        p = self.parts
        return multiply(x, p.values, p.scales, p.minima, zero_points=p.zero_points)


class _Float8Specification:
    """What the kernels compute, with other last bits: each block of inputs on its own, then its scale. Slowly, since weights of a block are
    widened and laid out for every product.
    """

    def __init__(self, stored: Float8Tensor) -> None:
        self.stored = stored
        self.tensors = (stored.values, stored.scales)

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        values, scales, size = self.stored.values, self.stored.scales, self.stored.block_size
        total = x.new_zeros((x.shape[0], len(values)), dtype=torch.float32)
        for block in range(scales.shape[1]):
            inputs = slice(block * size, (block + 1) * size)
            weight = pack(nn.Parameter(values[:, inputs].float(), requires_grad=False))
            total += linear(x[:, inputs].float().contiguous(), weight) * scales[:, block]
        return total.to(x.dtype)


class _Reordered:
    """A matrix whose columns are those of the given inputs."""

    def __init__(self, matrix: Matrix, inputs: torch.Tensor, library: NativeLibrary | None) -> None:
        self.matrix = matrix
        self.inputs = inputs
        self.tensors = (*matrix.tensors, inputs)
        self.columns = None if library is None else Columns(library, inputs)

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        taken = x.index_select(1, self.inputs) if self.columns is None else self.columns.take(x)
        return self.matrix.multiply(taken)


def _dense(weight: torch.Tensor, library: NativeLibrary | None) -> Matrix:
    if library is not None and packs(weight.dtype, in_features=weight.shape[1]):
        return _Packed(pack_dense(library, weight.contiguous()), is_dense=True)
    return _Dense(weight)


def _float8(stored: Float8Tensor, dtype: torch.dtype, library: NativeLibrary | None) -> Matrix:
    if not packs_float8(stored.shape[1], block_size=stored.block_size):
        return _dense(stored.dequantize().to(dtype), library)
    scales = stored.scales.expand(len(stored), -1).contiguous()
    values = stored.values.contiguous()
    if library is None:
        return _Float8Specification(replace(stored, values=values, scales=scales))
    return _Packed(pack_float8(library, values, scales, block_size=stored.block_size))


class _Parts:
    """What the kernels compute with. Zero points instead of minima where that is exact: half scales then take half of the memory."""

    def __init__(self, stored: QuantizedTensor) -> None:
        self.values = stored.values.contiguous()
        found = stored.zero_points()
        self.zero_points = None if found is None else found[1].contiguous()
        self.scales = (stored.scales if found is None else found[0]).contiguous()
        self.minima = None if stored.minima is None or found is not None else stored.minima.contiguous()

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [t for t in (self.values, self.scales, self.minima, self.zero_points) if t is not None]


def _grouped(stored: QuantizedTensor, library: NativeLibrary | None) -> Matrix:
    parts = _Parts(stored)
    if library is None:
        return _Specification(parts)
    return _Packed(
        pack_grouped(
            library,
            parts.values,
            parts.scales,
            parts.minima,
            num_bits=stored.num_bits,
            zero_points=parts.zero_points,
        )
    )
