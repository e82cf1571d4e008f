"""The blocks of ggml's quantised types as whole numbers with scales, bit for bit what the `gguf` package's `dequantize` computes.

A row is a sequence of blocks, each a few scales and packed numbers. The package gives floats only, so the numbers are taken out here, in
torch. Knows block layouts; no files, no names.

    Q4_1, 32 inputs in 20 bytes:   scale (2 bytes, float16) | minimum (2, float16) | 16 bytes, the inputs 0 to 15 in their low halves and
                                   16 to 31 in their high ones
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

# Of IQ4_NL and IQ4_XS, and of MXFP4: what their 4-bit numbers stand for.
_IQ4_TABLE = torch.tensor([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=torch.int8)
_FP4_TABLE = torch.tensor([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], dtype=torch.int8)


class Unpacked(NamedTuple):
    """Of rows of blocks [num_rows, num_blocks, block_bytes] uint8. values: [num_rows, num_blocks, block_size] int8; scales, minima:
    [num_rows, num_blocks, groups in a block].
    """

    values: torch.Tensor
    scales: torch.Tensor
    minima: torch.Tensor | None = None


def _q4_0(blocks: torch.Tensor) -> Unpacked:
    return Unpacked(_signed(_halves(blocks[..., 2:], count=1), 8), _half(blocks[..., :2]))


def _q4_1(blocks: torch.Tensor) -> Unpacked:
    return Unpacked(_signed(_halves(blocks[..., 4:], count=1), 0), _half(blocks[..., :2]), _half(blocks[..., 2:4]))


def _q5_0(blocks: torch.Tensor) -> Unpacked:
    values = _halves(blocks[..., 6:], count=1) | _fifth_bits(blocks[..., 2:6])
    return Unpacked(_signed(values, 16), _half(blocks[..., :2]))


def _q5_1(blocks: torch.Tensor) -> Unpacked:
    values = _halves(blocks[..., 8:], count=1) | _fifth_bits(blocks[..., 4:8])
    return Unpacked(_signed(values, 0), _half(blocks[..., :2]), _half(blocks[..., 2:4]))


def _q8_0(blocks: torch.Tensor) -> Unpacked:
    return Unpacked(blocks[..., 2:].view(torch.int8), _half(blocks[..., :2]))


def _iq4_nl(blocks: torch.Tensor) -> Unpacked:
    return Unpacked(_IQ4_TABLE[_halves(blocks[..., 2:], count=1).int()], _half(blocks[..., :2]))


def _mxfp4(blocks: torch.Tensor) -> Unpacked:
    """The scale is a power of two: the byte e stands for 2^(e - 128), which float32 has as a subnormal number for 0 and 1."""
    exponents = blocks[..., :1].int()
    bits = torch.where(exponents < 2, torch.full_like(exponents, 0x00200000) << exponents, (exponents - 1) << 23)
    return Unpacked(_FP4_TABLE[_halves(blocks[..., 1:], count=1).int()], bits.view(torch.float32))


def _q2_k(blocks: torch.Tensor) -> Unpacked:
    scales = blocks[..., :16]
    values = _signed(_fields(blocks[..., 16:80], count=2, shifts=(0, 2, 4, 6), mask=3), 0)
    d, d_min = _half(blocks[..., 80:82]).float(), _half(blocks[..., 82:84]).float()
    return Unpacked(values, d * (scales & 15).float(), -(d_min * (scales >> 4).float()))


def _q3_k(blocks: torch.Tensor) -> Unpacked:
    low = _fields(blocks[..., 32:96], count=2, shifts=(0, 2, 4, 6), mask=3)
    # 4 is subtracted where this bit is 0.
    high = _fields(blocks[..., :32], count=1, shifts=range(8), mask=1)
    packed = blocks[..., 96:108]
    scales = _fields(packed[..., :8], count=1, shifts=(0, 4), mask=15)
    scales = scales | _fields(packed[..., 8:], count=1, shifts=(0, 2, 4, 6), mask=3) << 4
    return Unpacked(_signed(low | high << 2, 4), _half(blocks[..., 108:110]).float() * _signed(scales, 32).float())


def _q4_k(blocks: torch.Tensor) -> Unpacked:
    scales, minima = _k_scales(blocks)
    return Unpacked(_signed(_halves(blocks[..., 16:], count=4), 0), scales, minima)


def _q5_k(blocks: torch.Tensor) -> Unpacked:
    scales, minima = _k_scales(blocks)
    values = _halves(blocks[..., 48:], count=4) | _fields(blocks[..., 16:48], count=1, shifts=range(8), mask=1) << 4
    return Unpacked(_signed(values, 0), scales, minima)


def _q6_k(blocks: torch.Tensor) -> Unpacked:
    values = _halves(blocks[..., :128], count=2)
    values = values | _fields(blocks[..., 128:192], count=2, shifts=(0, 2, 4, 6), mask=3) << 4
    scales = _half(blocks[..., 208:210]).float() * blocks[..., 192:208].view(torch.int8).float()
    return Unpacked(_signed(values, 32), scales)


def _iq4_xs(blocks: torch.Tensor) -> Unpacked:
    high = blocks[..., 2:4].contiguous().view(torch.int16)
    high = high >> torch.arange(0, 16, 2, dtype=torch.int16)
    scales = _fields(blocks[..., 4:8].unsqueeze(-1), count=1, shifts=(0, 4), mask=15).flatten(-2)
    scales = scales | (high & 3).to(torch.uint8) << 4
    values = _IQ4_TABLE[_halves(blocks[..., 8:], count=8).int()]
    return Unpacked(values, _half(blocks[..., :2]).float() * _signed(scales, 32).float())


def _tq1_0(blocks: torch.Tensor) -> Unpacked:
    """Five numbers of three values in a byte: its product with a power of 3, modulo 256, begins with one of them."""
    powers = torch.tensor([1, 3, 9, 27, 81], dtype=torch.uint8)
    parts = [
        (blocks[..., None, start:stop] * powers[:count, None]).flatten(-2)
        for start, stop, count in ((0, 32, 5), (32, 48, 5), (48, 52, 4))
    ]
    values = (torch.cat(parts, dim=-1).to(torch.int16) * 3) >> 8
    return Unpacked(values.to(torch.int8) - 1, _half(blocks[..., 52:54]))


def _tq2_0(blocks: torch.Tensor) -> Unpacked:
    values = _fields(blocks[..., :64], count=2, shifts=(0, 2, 4, 6), mask=3)
    return Unpacked(_signed(values, 1), _half(blocks[..., 64:66]))


def _k_scales(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and minima of Q4_K and Q5_K: two float16, and for each of 8 groups two numbers of 6 bits in 12 bytes:

    byte i       2 high bits of scale 4 + i, scale i         i from 0 to 3
    byte 4 + i   2 high bits of minimum 4 + i, minimum i
    byte 8 + i   4 low bits of minimum 4 + i, 4 low bits of scale 4 + i
    """
    d, d_min, packed = _half(blocks[..., :2]).float(), _half(blocks[..., 2:4]).float(), blocks[..., 4:16]
    first, second, third = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = torch.cat((first & 63, (third & 15) | (first >> 2 & 48)), dim=-1)
    minima = torch.cat((second & 63, (third >> 4) | (second >> 2 & 48)), dim=-1)
    return d * scales.float(), -(d_min * minima.float())


def _half(two_bytes: torch.Tensor) -> torch.Tensor:
    return two_bytes.contiguous().view(torch.float16)


def _halves(packed: torch.Tensor, *, count: int) -> torch.Tensor:
    """In each of `count` equal parts, first the low halves of all bytes, then the high ones."""
    return _fields(packed, count=count, shifts=(0, 4), mask=15)


def _fields(packed: torch.Tensor, *, count: int, shifts: Sequence[int], mask: int) -> torch.Tensor:
    """In each of `count` equal parts, the bits at the first shift of all bytes, then those at the second, and so on."""
    parts = packed.unflatten(-1, (count, -1))
    return torch.stack([parts >> shift & mask for shift in shifts], dim=-2).flatten(-3)


def _fifth_bits(four_bytes: torch.Tensor) -> torch.Tensor:
    """16 times the bits of a little-endian whole number, the lowest first."""
    return (four_bytes[..., None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten(-2) << 4


def _signed(values: torch.Tensor, offset: int) -> torch.Tensor:
    """uint8 below 128 -> int8, less `offset`."""
    signed = values.view(torch.int8)
    return signed - offset if offset else signed


UNPACK: dict[str, Callable[[torch.Tensor], Unpacked]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "IQ4_NL": _iq4_nl,
    "MXFP4": _mxfp4,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_XS": _iq4_xs,
    "TQ1_0": _tq1_0,
    "TQ2_0": _tq2_0,
}
