"""Matrices of GPTQ checkpoints: words along the inputs, zero points along the outputs, and perhaps groups of inputs in another order.

    qweight  [in_features * bits / 32, out_features] int32      qzeros  [num_groups, out_features * bits / 32] int32
    scales   [num_groups, out_features]                         g_idx   [in_features] int32, the group of each input

The format "gptq" keeps zero points less one, "gptq_v2" as they are. Knows no other format.
"""

from collections.abc import Mapping

import torch

from workers.errors import CheckpointError
from workers.quant.forms import GroupedForm
from workers.quant.quantized import NumBits
from workers.weights.quantized.header import FLOATS, TensorHeader, check, number_of_groups, require
from workers.weights.quantized.integers import unpack
from workers.weights.quantized.source import StoredTensor

REQUIRED, OPTIONAL = ("qweight", "qzeros", "scales"), ("g_idx",)


def check_gptq(module: str, tensors: Mapping[str, TensorHeader], shape: tuple[int, int]) -> GroupedForm:
    """shape: of the matrix. Raises CheckpointError for what is missing or of another type or shape."""
    require(module, tensors, REQUIRED, optional=OPTIONAL)
    out_features, in_features = shape
    words = tensors["qweight"]
    num_bits = _num_bits(words, in_features)
    check(words, dtypes=("I32",), shape=(in_features * num_bits // 32, out_features))
    scales = tensors["scales"]
    num_groups = number_of_groups(scales, in_features, dim=0)
    check(scales, dtypes=FLOATS, shape=(num_groups, out_features))
    check(tensors["qzeros"], dtypes=("I32",), shape=(num_groups, -(-out_features * num_bits // 32)))
    if "g_idx" in tensors:
        check(tensors["g_idx"], dtypes=("I32", "I64"), shape=(in_features,))
    return GroupedForm(num_bits=num_bits, group_size=in_features // num_groups, has_minima=True, wide=True)


class GptqPacking:
    """See `Packing`. zero_offset: what is added to the stored zero points."""

    def __init__(
        self, module: str, tensors: Mapping[str, StoredTensor], shape: tuple[int, int], *, zero_offset: int
    ) -> None:
        form = check_gptq(module, tensors, shape)
        self.name = tensors["qweight"].name
        self.shape = shape
        self.num_bits: NumBits = form.num_bits
        self.num_groups = shape[1] // form.group_size
        self._tensors = tensors
        self._zero_offset = zero_offset

    def numbers(self, rows: slice, columns: slice) -> torch.Tensor:
        per_word = 32 // self.num_bits
        first = columns.start // per_word
        words = self._tensors["qweight"][first : -(-columns.stop // per_word), rows]
        # Turning words is faster than turning their numbers.
        numbers = unpack(words.T, self.num_bits)
        return numbers[:, columns.start - first * per_word :][:, : columns.stop - columns.start]

    def scales(self, rows: slice) -> torch.Tensor:
        return self._tensors["scales"][:, rows].T

    def zero_points(self, rows: slice) -> torch.Tensor:
        per_word = 32 // self.num_bits
        first = rows.start // per_word
        words = self._tensors["qzeros"][:, first : -(-rows.stop // per_word)]
        stored = unpack(words, self.num_bits)[:, rows.start - first * per_word :][:, : rows.stop - rows.start]
        return ((stored.int() + self._zero_offset) & ((1 << self.num_bits) - 1)).T

    def groups(self) -> torch.Tensor | None:
        return self._tensors["g_idx"][:].long() if "g_idx" in self._tensors else None


def _num_bits(words: TensorHeader, in_features: int) -> NumBits:
    """From the number of words: of 64 inputs, 8 words have 4 bits each. Raises CheckpointError for other bits than 4 and 8."""
    num_words = words.shape[0] if len(words.shape) == 2 else 0
    if num_words * 8 == in_features:
        return 4
    if num_words * 4 == in_features:
        return 8
    raise CheckpointError(
        f"{words.name} has shape {list(words.shape)}, which is neither 4 nor 8 bits for each of {in_features} inputs.",
        remedy="Use GPTQ weights of 4 or 8 bits whose configuration belongs to them.",
    )
