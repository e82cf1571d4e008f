"""What stored values become on a CPU: packed for the compiled kernels where there are any, else for torch.

Knows which forms compute as they are and which become dense; no layers and no files.
"""

from collections.abc import Sequence

import torch
from torch import nn

from workers.config import QUANTIZATION_GROUP_SIZE
from workers.native.library import NativeLibrary
from workers.native.matrices import PackedMatrix, pack_dense, pack_grouped, packs
from workers.quant.dense import linear, pack
from workers.quant.grouped import multiply
from workers.quant.quantized import QuantizedTensor, StoredValues, dense_values
from workers.quant.stored import Matrix, Pack


def cpu_pack(library: NativeLibrary | None) -> Pack:
    """library: the compiled kernels, None without."""

    def pack_values(values: StoredValues, dtype: torch.dtype, device: torch.device) -> Matrix:
        if not isinstance(values, QuantizedTensor) or values.group_size % QUANTIZATION_GROUP_SIZE:
            return _dense(dense_values(values).to(dtype), library)
        matrix = _grouped(values.regroup(QUANTIZATION_GROUP_SIZE), library)
        return matrix if values.inputs is None else _Reordered(matrix, values.inputs)

    return pack_values


class _Packed:
    """A matrix of the compiled kernels."""

    def __init__(self, matrix: PackedMatrix, *, is_dense: bool = False) -> None:
        self.tensors = (matrix.packed,)
        self.multiply = matrix.multiply
        self.is_dense = is_dense


class _Dense:
    is_dense = True

    def __init__(self, weight: torch.Tensor) -> None:
        self.tensors = (pack(nn.Parameter(weight, requires_grad=False)),)

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.tensors[0])


class _Specification:
    """The kernels' bits, in torch."""

    def __init__(self, values: QuantizedTensor) -> None:
        self.values = values
        self.tensors: Sequence[torch.Tensor] = [
            t for t in (values.values, values.scales, values.minima) if t is not None
        ]

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        return multiply(x, self.values.values, self.values.scales, self.values.minima)


class _Reordered:
    """A matrix whose columns are those of the given inputs."""

    def __init__(self, matrix: Matrix, inputs: torch.Tensor) -> None:
        self.matrix = matrix
        self.inputs = inputs
        self.tensors = (*matrix.tensors, inputs)

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        return self.matrix.multiply(x.index_select(1, self.inputs))


def _dense(weight: torch.Tensor, library: NativeLibrary | None) -> Matrix:
    if library is not None and packs(weight.dtype, in_features=weight.shape[1]):
        return _Packed(pack_dense(library, weight.contiguous()), is_dense=True)
    return _Dense(weight)


def _grouped(values: QuantizedTensor, library: NativeLibrary | None) -> Matrix:
    if library is None:
        return _Specification(values)
    minima = None if values.minima is None else values.minima.contiguous()
    return _Packed(
        pack_grouped(library, values.values.contiguous(), values.scales.contiguous(), minima, num_bits=values.num_bits)
    )
