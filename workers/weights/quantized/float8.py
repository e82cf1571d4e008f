"""Matrices of 8-bit floats: of fp8 checkpoints, and of compressed-tensors.

    weight        [out_features, in_features] float8_e4m3fn
    weight_scale or weight_scale_inv, by which the weight is multiplied: one number, [out_features] or [out_features, 1],
                  or [ceil(out_features / rows), ceil(in_features / inputs)] of blocks
    input_scale   one number by which inputs are divided before they are rounded, or activation_scale; not in all checkpoints

Knows no other format.
"""

import math
from collections.abc import Mapping

import torch

from workers.errors import CheckpointError
from workers.quant.forms import Float8Form
from workers.quant.method import Index
from workers.quant.quantized import Float8Tensor
from workers.weights.quantized.header import FLOATS, TensorHeader, check, require
from workers.weights.quantized.source import StoredTensor

SCALES = ("weight_scale", "weight_scale_inv")
INPUT_SCALES = ("input_scale", "activation_scale")


def check_float8(
    module: str, tensors: Mapping[str, TensorHeader], shape: tuple[int, int], *, block_size: tuple[int, int] | None
) -> Float8Form:
    """shape: of the matrix; block_size: as the configuration says. Raises CheckpointError for what is missing or does not fit."""
    name = next((name for name in SCALES if name in tensors), SCALES[0])
    require(module, tensors, ("weight", name), optional=INPUT_SCALES)
    check(tensors["weight"], dtypes=("F8_E4M3",), shape=shape)
    scales, (out_features, in_features) = tensors[name], shape
    if scales.shape in ((), (1,), (1, 1)):
        form = Float8Form()
    elif scales.shape in ((out_features,), (out_features, 1)) and block_size is None:
        form = Float8Form(block_size=(1, None))
    elif block_size is not None and scales.shape == (
        -(-out_features // block_size[0]),
        -(-in_features // block_size[1]),
    ):
        form = Float8Form(block_size=block_size)
    else:
        raise CheckpointError(
            f"{scales.name} has shape {list(scales.shape)}, which fits neither a matrix of shape {list(shape)} nor its rows or blocks.",
            remedy="Use a checkpoint whose quantization_config belongs to its weights.",
        )
    check(scales, dtypes=FLOATS, shape=scales.shape)
    for name in INPUT_SCALES:
        if name in tensors:
            check(
                tensors[name], dtypes=FLOATS, shape=tensors[name].shape if math.prod(tensors[name].shape) == 1 else ()
            )
    return form


class Float8Matrix:
    """A `WeightSource`."""

    def __init__(
        self,
        module: str,
        tensors: Mapping[str, StoredTensor],
        shape: tuple[int, int],
        *,
        block_size: tuple[int, int] | None,
    ) -> None:
        self._form = check_float8(module, tensors, shape, block_size=block_size)
        self._weight = tensors["weight"]
        self._scales = next(tensors[name] for name in SCALES if name in tensors)
        self._input_scale = next((tensors[name] for name in INPUT_SCALES if name in tensors), None)
        self.name = self._weight.name
        self.shape: tuple[int, ...] = shape

    def __getitem__(self, index: Index) -> Float8Tensor:
        rows_asked, columns_asked = index if isinstance(index, tuple) else (index, slice(None))
        rows = slice(*rows_asked.indices(self.shape[0])[:2])
        columns = slice(*columns_asked.indices(self.shape[1])[:2])
        values, scales = self._weight[rows, columns], self._scales[:].float()
        input_scale = None if self._input_scale is None else self._input_scale[:].float().view(())
        block_rows, block_inputs = self._form.block_size
        size = self.shape[1]
        if block_rows is None:
            scales = scales.view(1, 1)
        elif block_inputs is None:
            scales = scales.view(-1, 1)[rows]
        else:
            of_rows = scales[torch.arange(rows.start, rows.stop) // block_rows]
            # A part of a block keeps its scale: of blocks of 128, inputs 64 to 192 are two of 64. The last block may be shorter.
            size = math.gcd(block_inputs, columns.start, 0 if columns.stop == size else columns.stop)
            scales = of_rows[:, torch.arange(columns.start, columns.stop, size) // block_inputs]
        return Float8Tensor(values=values, scales=scales, block_size=size, input_scale=input_scale)
