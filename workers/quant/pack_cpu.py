"""What stored values become on a CPU: packed for the compiled kernels where there are any, else for torch.

Knows which forms compute as they are and which become dense; no layers and no files.
"""

import torch
from torch import nn

from workers.config import QUANTIZATION_GROUP_SIZE
from workers.native.library import NativeLibrary
from workers.native.matrices import Columns, PackedMatrix, pack_dense, pack_grouped, packs
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
