"""Weights of 8 or 4 bits as the Triton kernels of this folder read them. Knows the layout, no product and no checkpoint.

Words of 16 bits hold 4 or 2 values. 32 words of a row are a block: 128 inputs of 4 bits, or 64 of 8. Field i of a block's words, bits
num_bits * i and up, are the 32 inputs from 32 * i on. So one multiplication by 32 words takes inputs that are adjacent, and of one group.
In a row of 4 bits that begins with 128 values v0, v1, ...:

    word 0 of block 0    v0  | v32 << 4 | v64 << 8 | v96  << 12
    word 1 of block 0    v1  | v33 << 4 | v65 << 8 | v97  << 12

Blocks are outermost, then rows: what a program reads in one step is one piece of memory, and each thread copies 16 bytes along the inputs.
A row that is not whole blocks ends with words of zeros, whose inputs no kernel reads.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional

NumBits = Literal[4, 8]
WORDS = 32  # of one row in a block
GROUP = 32  # the smallest group, and the inputs of one field
# At a time, so many values take 16 bytes each until they are in words.
PACKED_AT_ONCE = 1 << 24
_OF_HALVES = {1: torch.int16, 2: torch.int32, 4: torch.int64}


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class PackedWeight:
    """weight[o, i] = value[o, i] * scale[o, group of i] + minimum[o, group of i].

    words: [num_blocks, out_features, 32] int16. group_size: a multiple of 32 that divides a block or that a block divides, or all inputs.
    scales, by row in the last dimension: float32 [num_groups, out_features]; or halves: float16 in integers, with minima
    [num_groups, out_features] int32 of a scale and, above it, a minimum; without minima, the scales of a block's groups in one integer,
    [num_blocks, out_features], or of one group where that has several blocks. minima: like scales, if these are float32.
    offset: what is subtracted from the bits of a value. is_float8: the values are float8_e4m3fn.
    """

    words: torch.Tensor
    scales: torch.Tensor
    minima: torch.Tensor | None
    in_features: int
    num_bits: NumBits
    group_size: int
    has_minima: bool
    is_float8: bool = False

    @property
    def out_features(self) -> int:
        return self.words.shape[1]

    @property
    def halves(self) -> bool:
        return self.scales.dtype != torch.float32

    @property
    def offset(self) -> int:
        if self.is_float8:
            return 0
        return 128 if self.num_bits == 8 else 0 if self.has_minima else 8

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.words, self.scales) if self.minima is None else (self.words, self.scales, self.minima)


def block_size(num_bits: NumBits) -> int:
    """Inputs of a block."""
    return WORDS * 16 // num_bits


def group_size_for(group_size: int, *, in_features: int, num_bits: NumBits) -> int | None:
    """The largest size of groups, at most the given one, that the kernels read; None if there is none.

    Of 4 bits, with blocks of 128: 32, 64, 128 and 256 as they are; of 96 inputs, 32, each group's scale three times.
    """
    if in_features % GROUP or group_size % GROUP:
        return None
    return group_size if group_size >= in_features else _whole(group_size, block_size(num_bits))


def pack(
    values: torch.Tensor,
    scales: torch.Tensor,
    minima: torch.Tensor | None = None,
    *,
    num_bits: NumBits,
    device: torch.device | None = None,
) -> PackedWeight:
    """values: [out_features, in_features] int8, or float8_e4m3fn without minima; -8 to 7 of 4 bits, 0 to 15 with minima; -128 to 127 of 8.
    scales, minima: [out_features, num_groups] float16 or float32, of a size for which `group_size_for` gives the same.
    device: where the words are made and stay; None: where the values are.
    """
    out_features, in_features = values.shape
    group_size = in_features // scales.shape[1]
    assert group_size == group_size_for(group_size, in_features=in_features, num_bits=num_bits), group_size
    device = values.device if device is None else device
    is_float8 = values.dtype == torch.float8_e4m3fn
    size = block_size(num_bits)
    num_blocks, missing = -(-in_features // size), -in_features % size
    offset = 0 if is_float8 else 128 if num_bits == 8 else 0 if minima is not None else 8
    words = torch.empty((num_blocks, out_features, WORDS), dtype=torch.int16, device=device)
    num_rows = max(1, PACKED_AT_ONCE // in_features)
    for start in range(0, out_features, num_rows):
        part = values[start : start + num_rows].to(device)
        bits = part.view(torch.uint8).int() if is_float8 else part.int() + offset
        by_field = functional.pad(bits, (0, missing)).unflatten(1, (num_blocks, -1, WORDS))
        joined = by_field[:, :, 0]
        for field in range(1, 16 // num_bits):
            joined = joined | by_field[:, :, field] << num_bits * field
        # Of 32 bits the lower half.
        words[:, start : start + num_rows] = joined.contiguous().view(torch.int16)[..., ::2].transpose(0, 1)
    minima = None if minima is None else minima.to(device)
    packed_scales, packed_minima = _pack_scales(scales.to(device), minima, group_size=group_size, size=size)
    return PackedWeight(
        words=words,
        scales=packed_scales,
        minima=packed_minima,
        in_features=in_features,
        num_bits=num_bits,
        group_size=group_size,
        has_minima=minima is not None,
        is_float8=is_float8,
    )


def unpack(weight: PackedWeight) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """values [out_features, in_features], int8 or float8_e4m3fn, scales and minima [out_features, num_groups], as `pack` takes them."""
    words = weight.words.to(torch.int32) & 0xFFFF
    mask = (1 << weight.num_bits) - 1
    fields = [words >> weight.num_bits * field & mask for field in range(16 // weight.num_bits)]
    bits = torch.stack(fields, dim=2).permute(1, 0, 2, 3).flatten(1)[:, : weight.in_features]
    values = (
        bits.to(torch.uint8).view(torch.float8_e4m3fn) if weight.is_float8 else (bits - weight.offset).to(torch.int8)
    )
    num_groups = weight.in_features // weight.group_size
    if not weight.halves:
        minima = None if weight.minima is None else weight.minima.T[:, :num_groups]
        return values, weight.scales.T[:, :num_groups], minima
    halves = weight.scales.T.contiguous().view(torch.float16)
    if not weight.has_minima:
        return values, halves[:, :num_groups], None
    return values, halves[:, 0 : 2 * num_groups : 2], halves[:, 1 : 2 * num_groups : 2]


def _pack_scales(
    scales: torch.Tensor, minima: torch.Tensor | None, *, group_size: int, size: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The last block, too, gets a scale for each of its groups."""
    is_one, per_block = scales.shape[1] == 1, max(1, size // group_size)
    if not is_one:
        missing = -scales.shape[1] % per_block
        scales = functional.pad(scales, (0, missing))
        minima = None if minima is None else functional.pad(minima, (0, missing))
    if scales.dtype != torch.float16 or (minima is not None and minima.dtype != torch.float16):
        by_row = scales.float().T.contiguous()
        return by_row, None if minima is None else minima.float().T.contiguous()
    per_word = 1 if is_one else per_block
    if minima is not None:
        scales, per_word = torch.stack((scales, minima), dim=2).flatten(1), 2
    return scales.contiguous().view(_OF_HALVES[per_word]).T.contiguous(), None


def _whole(group_size: int, size: int) -> int:
    return group_size if group_size % size == 0 else math.gcd(group_size, size)
