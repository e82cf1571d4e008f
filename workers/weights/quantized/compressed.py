"""Matrices of compressed-tensors checkpoints of whole numbers, packed into words or a byte each.

    weight_packed  [out_features, ceil(in_features * bits / 32)] int32, numbers from 0; the middle one is 0
    weight         [out_features, in_features] int8, instead
    weight_scale   [out_features, num_groups], or [1] for the whole matrix
    weight_zero_point  like the scales: int8, or along the outputs in words where the weight is; a number of the weight's own range
    weight_g_idx   [in_features] int32, the group of each input

Knows no other format.
"""

from collections.abc import Mapping

import torch

from workers.errors import CheckpointError
from workers.quant.forms import GroupedForm
from workers.quant.quantized import NumBits
from workers.weights.quantized.header import FLOATS, TensorHeader, check, number_of_groups, require
from workers.weights.quantized.integers import unpack
from workers.weights.quantized.source import StoredTensor

OPTIONAL = ("weight_shape", "weight_zero_point", "weight_g_idx")


def check_compressed(module: str, tensors: Mapping[str, TensorHeader], shape: tuple[int, int]) -> GroupedForm:
    """shape: of the matrix. Raises CheckpointError for what is missing or of another type or shape."""
    is_packed = "weight_packed" in tensors
    weight = "weight_packed" if is_packed else "weight"
    require(module, tensors, (weight, "weight_scale"), optional=OPTIONAL)
    out_features, in_features = shape
    num_bits: NumBits = _num_bits(tensors[weight], in_features) if is_packed else 8
    width = -(-in_features * num_bits // 32) if is_packed else in_features
    check(tensors[weight], dtypes=("I32" if is_packed else "I8",), shape=(out_features, width))
    scales = tensors["weight_scale"]
    is_whole = _is_whole(scales)
    num_groups = 1 if is_whole else number_of_groups(scales, in_features, dim=1)
    check(scales, dtypes=FLOATS, shape=scales.shape if is_whole else (out_features, num_groups))
    if zeros := tensors.get("weight_zero_point"):
        if is_packed:
            check(zeros, dtypes=("I32",), shape=(-(-out_features * num_bits // 32), num_groups))
        else:
            check(zeros, dtypes=("I8",), shape=zeros.shape if _is_whole(zeros) else (out_features, num_groups))
    if "weight_g_idx" in tensors:
        check(tensors["weight_g_idx"], dtypes=("I32", "I64"), shape=(in_features,))
    return GroupedForm(
        num_bits=num_bits,
        group_size=in_features // num_groups,
        has_minima=zeros is not None,
        wide=scales.dtype != "F16",
        reordered="weight_g_idx" in tensors,
    )


class CompressedPacking:
    """See `Packing`."""

    def __init__(self, module: str, tensors: Mapping[str, StoredTensor], shape: tuple[int, int]) -> None:
        form = check_compressed(module, tensors, shape)
        self._is_packed = "weight_packed" in tensors
        self._weight = tensors["weight_packed" if self._is_packed else "weight"]
        self.name = self._weight.name
        self.shape = shape
        self.num_bits: NumBits = form.num_bits
        self.num_groups = shape[1] // form.group_size
        self._tensors = tensors

    def numbers(self, rows: slice, columns: slice) -> torch.Tensor:
        if not self._is_packed:
            return self._weight[rows, columns].view(torch.uint8) ^ 128
        per_word = 32 // self.num_bits
        first = columns.start // per_word
        words = self._weight[rows, first : -(-columns.stop // per_word)]
        numbers = unpack(words, self.num_bits)
        return numbers[:, columns.start - first * per_word :][:, : columns.stop - columns.start]

    def scales(self, rows: slice) -> torch.Tensor:
        scales = self._tensors["weight_scale"]
        if _is_whole(scales):
            return scales[:].view(1, 1).expand(rows.stop - rows.start, 1)
        return scales[rows]

    def zero_points(self, rows: slice) -> torch.Tensor | None:
        zeros = self._tensors.get("weight_zero_point")
        if zeros is None:
            return None
        if not self._is_packed:
            stored = zeros[:].view(1, 1).expand(rows.stop - rows.start, 1) if _is_whole(zeros) else zeros[rows]
            return stored.int() + 128
        per_word = 32 // self.num_bits
        first = rows.start // per_word
        words = zeros[first : -(-rows.stop // per_word)]
        return unpack(words.T, self.num_bits)[:, rows.start - first * per_word :][:, : rows.stop - rows.start].T.int()

    def groups(self) -> torch.Tensor | None:
        return self._tensors["weight_g_idx"][:].long() if "weight_g_idx" in self._tensors else None


def _num_bits(words: TensorHeader, in_features: int) -> NumBits:
    """From the number of words in a row. Raises CheckpointError for other bits than 4 and 8."""
    num_words = words.shape[1] if len(words.shape) == 2 else 0
    if num_words == -(-in_features // 8):
        return 4
    if num_words == -(-in_features // 4):
        return 8
    raise CheckpointError(
        f"{words.name} has shape {list(words.shape)}, which is neither 4 nor 8 bits for each of {in_features} inputs.",
        remedy="Use compressed-tensors weights of 4 or 8 bits whose configuration belongs to them.",
    )


def _is_whole(tensor: TensorHeader) -> bool:
    """Whether it is one number for the whole matrix."""
    return tensor.shape in ((), (1,))
