"""Matrices of AWQ checkpoints in the version "gemm": words along the outputs, in an order of their own, and zero points like them.

    qweight  [in_features, out_features / 8] int32      qzeros  [num_groups, out_features / 8] int32
    scales   [num_groups, out_features]

Knows no other format.
"""

from collections.abc import Mapping

import torch

from workers.quant.forms import GroupedForm
from workers.quant.quantized import NumBits
from workers.weights.quantized.header import FLOATS, TensorHeader, check, number_of_groups, require
from workers.weights.quantized.integers import unpack_awq
from workers.weights.quantized.source import StoredTensor

REQUIRED = ("qweight", "qzeros", "scales")
PER_WORD = 8


def check_awq(module: str, tensors: Mapping[str, TensorHeader], shape: tuple[int, int]) -> GroupedForm:
    """shape: of the matrix. Raises CheckpointError for what is missing or of another type or shape."""
    require(module, tensors, REQUIRED)
    out_features, in_features = shape
    check(tensors["qweight"], dtypes=("I32",), shape=(in_features, out_features // PER_WORD))
    scales = tensors["scales"]
    num_groups = number_of_groups(scales, in_features, dim=0)
    check(scales, dtypes=FLOATS, shape=(num_groups, out_features))
    check(tensors["qzeros"], dtypes=("I32",), shape=(num_groups, out_features // PER_WORD))
    return GroupedForm(num_bits=4, group_size=in_features // num_groups, has_minima=True, wide=True)


class AwqPacking:
    """See `Packing`."""

    num_bits: NumBits = 4

    def __init__(self, module: str, tensors: Mapping[str, StoredTensor], shape: tuple[int, int]) -> None:
        self.name = tensors["qweight"].name if "qweight" in tensors else module
        self.num_groups = shape[1] // check_awq(module, tensors, shape).group_size
        self.shape = shape
        self._tensors = tensors

    def numbers(self, rows: slice, columns: slice) -> torch.Tensor:
        return self._read("qweight", columns, rows)

    def scales(self, rows: slice) -> torch.Tensor:
        return self._tensors["scales"][:, rows].T

    def zero_points(self, rows: slice) -> torch.Tensor:
        return self._read("qzeros", slice(0, self.num_groups), rows).int()

    def groups(self) -> None:
        return None

    def _read(self, suffix: str, inputs: slice, outputs: slice) -> torch.Tensor:
        """[outputs, inputs] uint8."""
        first = outputs.start // PER_WORD
        words = self._tensors[suffix][inputs, first : -(-outputs.stop // PER_WORD)]
        return unpack_awq(words)[outputs.start - first * PER_WORD :][: outputs.stop - outputs.start]
