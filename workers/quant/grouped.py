"""Weights of 8 or 4 bits, quantised at load, in groups of 32 inputs with a float16 scale each (the formats of llama.cpp's Q8_0 and Q4_0).

The inputs of a product are rounded to 8 bits in the same groups, so a group's sum is a whole number and exact. The functions here are the
specification, in torch; where the compiled kernels (native/cpp/gemm/gemm_int.cpp) are usable they compute the same bits, many times
faster. But in bfloat16 with AMX they do not round inputs: see native/cpp/gemm/gemm_expanded_amx.h. Knows no ranks and no layers.
"""

import logging
from typing import cast

import torch
from torch import nn

from workers.config import QUANTIZATION_GROUP_SIZE
from workers.native.library import NativeLibrary
from workers.native.matrices import pack_grouped
from workers.quant.dense import get_matrix, set_matrix
from workers.quant.method import WeightLoader, WeightMethod, new_weight
from workers.quant.quantized import NumBits, StoredValues, dense_values

log = logging.getLogger(__name__)

LARGEST_INT8 = 127


def quantize_weight(weight: torch.Tensor, *, num_bits: NumBits) -> tuple[torch.Tensor, torch.Tensor]:
    """weight: [out_features, in_features], any float type -> values [out_features, in_features] int8, scales [out_features, num_groups]
    float16, with weight ~ value * scale. 8 bits: -127 to 127; 4 bits: -8 to 7, where the value of largest magnitude becomes -8.
    """
    groups = weight.float().unflatten(1, (-1, QUANTIZATION_GROUP_SIZE))
    extremes = groups.gather(2, groups.abs().argmax(dim=2, keepdim=True))
    scales = extremes.abs() / LARGEST_INT8 if num_bits == 8 else extremes / -8
    # Half precision rounds the scale first, so that the values fit to the scale that is kept.
    scales = scales.clamp(-65504, 65504).half()
    inverse = torch.where(scales == 0, 0.0, 1.0 / scales.float())
    lowest, highest = (-LARGEST_INT8, LARGEST_INT8) if num_bits == 8 else (-8, 7)
    values = (groups * inverse).round_().clamp_(lowest, highest).to(torch.int8)
    return values.flatten(1), scales.squeeze(2)


def quantize_inputs(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x: [num_tokens, in_features] -> whole numbers from -127 to 127 [num_tokens, num_groups, 32] and scales [num_tokens, num_groups],
    both float32.
    """
    groups = x.float().unflatten(1, (-1, QUANTIZATION_GROUP_SIZE))
    largest = groups.abs().amax(dim=2)
    # Of two tensors, because torch divides a number by a tensor in two steps.
    inverse = torch.where(largest > 0, torch.full_like(largest, LARGEST_INT8) / largest, 0.0)
    return (groups * inverse[..., None]).round_(), largest / LARGEST_INT8


def multiply(
    x: torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor,
    minima: torch.Tensor | None = None,
    *,
    zero_points: torch.Tensor | None = None,
) -> torch.Tensor:
    """x @ ((values - zero_points) * scales + minima).T, with x rounded to 8 bits. x: [num_tokens, in_features]; values and scales: see
    `quantize_weight`; minima and zero_points: like scales; zero points are whole numbers.

    Group by group in order, in float32, sum += float(dot of a group) * (weight scale * input scale), and
    sum += float(sum of the group's inputs) * (minimum * input scale); then rounded to the dtype of x.
    """
    inputs, input_scales = quantize_inputs(x)
    weights, weight_scales = values.float().unflatten(1, (-1, QUANTIZATION_GROUP_SIZE)), scales.float()
    if zero_points is not None:
        weights = weights - zero_points.float()[..., None]
    total = x.new_zeros((x.shape[0], values.shape[0]), dtype=torch.float32)
    for group in range(weights.shape[1]):
        # Whole numbers below 2^24 are exact in float32 in any order.
        dots = inputs[:, group] @ weights[:, group].T
        total += dots * (weight_scales[:, group] * input_scales[:, group, None])
        if minima is not None:
            sums = inputs[:, group].sum(dim=1, keepdim=True)
            total += sums * (minima[:, group].float() * input_scales[:, group, None])
    return total.to(x.dtype)


class GroupedMethod:
    """See `WeightMethod`. Until `finish`, `weight` has the quantised values, [out_features, in_features] int8, or two of them in a byte.

    A tied output head stays in the embedding's form, and `tied` computes it.
    """

    shares_embedding = True

    def __init__(self, num_bits: NumBits, *, library: NativeLibrary | None, tied: WeightMethod) -> None:
        self.num_bits: NumBits = num_bits
        self.library = library
        self.tied = tied

    def create(
        self,
        layer: nn.Module,
        out_features: int,
        in_features: int,
        *,
        weight_loader: WeightLoader,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        assert in_features % QUANTIZATION_GROUP_SIZE == 0, (
            f"{in_features} inputs are not whole groups of {QUANTIZATION_GROUP_SIZE}"
        )
        num_bytes = in_features * self.num_bits // 8
        weight = new_weight((out_features, num_bytes), weight_loader, dtype=torch.int8, device=device)
        layer.register_parameter("weight", weight)
        scales = torch.empty((out_features, in_features // QUANTIZATION_GROUP_SIZE), dtype=torch.float16, device=device)
        layer.register_buffer("scales", scales, persistent=False)

    def load(self, layer: nn.Module, values: StoredValues, rows: slice) -> int:
        quantized, scales = quantize_weight(dense_values(values), num_bits=self.num_bits)
        target = _weight(layer)[rows]
        target.copy_(quantized if self.num_bits == 8 else _in_pairs(quantized))
        _scales(layer)[rows] = scales
        return target.numel()

    def finish(self, layer: nn.Module) -> None:
        if not hasattr(layer, "scales"):
            self.tied.finish(layer)
        elif self.library is not None:
            matrix = pack_grouped(self.library, self._values(layer), _scales(layer), num_bits=self.num_bits)
            set_matrix(layer, matrix)
            del layer.scales

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        matrix = get_matrix(layer)
        if matrix is not None:
            product = matrix.multiply(x)
        elif hasattr(layer, "scales"):
            product = multiply(x, self._values(layer), _scales(layer))
        else:
            return self.tied.apply(layer, x, bias)
        return product if bias is None else product + bias

    def _values(self, layer: nn.Module) -> torch.Tensor:
        weight = _weight(layer).detach()
        return weight if self.num_bits == 8 else _from_pairs(weight)


def _in_pairs(values: torch.Tensor) -> torch.Tensor:
    """[out_features, in_features] from -8 to 7 -> [out_features, in_features / 2] int8, even inputs in the low half."""
    offset = (values + 8).to(torch.uint8)
    return (offset[:, ::2] | offset[:, 1::2] << 4).view(torch.int8)


def _from_pairs(pairs: torch.Tensor) -> torch.Tensor:
    offset = pairs.view(torch.uint8)
    return (torch.stack((offset & 15, offset >> 4), dim=2).flatten(1).to(torch.int8) - 8).contiguous()


def _weight(layer: nn.Module) -> nn.Parameter:
    return cast(nn.Parameter, layer.weight)


def _scales(layer: nn.Module) -> torch.Tensor:
    return cast(torch.Tensor, layer.scales)
