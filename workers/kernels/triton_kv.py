"""Keys and values in 8 bits, in Triton: what the kernels that write and read them share. The specification is `quantized_kv.py`.

float8 is handled by its bits, because a GPU before compute capability 8.9 does not know it; so all GPUs compute the same bits.
"""

import torch
import triton
import triton.language as tl

from workers.kernels.quantized_kv import KV_DTYPES, Cache, parts_of

# The names of --kv-cache-dtype, by the dtype of the values; of all others, "auto".
_NAMES = {dtype: name for name, dtype in KV_DTYPES.items()}


def kernel_arguments(cache: Cache) -> tuple[torch.Tensor, torch.Tensor, str]:
    """Its values, its scales and its form ("auto", "int8", "fp8") as kernels take them. float8 goes as bytes; "auto" has no scales, and
    its values stand in for them.
    """
    values, scales = parts_of(cache)
    form = _NAMES.get(values.dtype, "auto")
    assert values.is_contiguous() and (scales is None or scales.is_contiguous()), "the caches must be contiguous"
    if scales is None:
        return values, values, form
    return values.view(torch.uint8) if form == "fp8" else values, scales, form


@triton.jit
def find_scale(largest, FORM: tl.constexpr):
    """The scale of numbers of which the largest has the bits `largest` without its sign."""
    LIMIT: tl.constexpr = 127.0 if FORM == "int8" else 448.0
    return tl.div_rn(largest.to(tl.float32, bitcast=True), LIMIT)


@triton.jit
def size_bits(x):
    """The bits of |x| in float32. As integers they are in the order of the numbers, with NaN above all."""
    return x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def encode(x, scale, FORM: tl.constexpr):
    """x / scale in 8 bits: int8, or the bits of float8 as uint8."""
    LIMIT: tl.constexpr = 127.0 if FORM == "int8" else 448.0
    value = tl.div_rn(x.to(tl.float32), tl.where(scale == 0.0, 1.0, scale))
    value = tl.minimum(tl.maximum(value, -LIMIT), LIMIT)
    if FORM == "int8":
        # Above 2^23 a float32 has no binary places: the sum rounds to whole numbers, halves to even.
        coded = ((value + 12582912.0) - 12582912.0).to(tl.int8)
    else:
        bits = value.to(tl.int32, bitcast=True)
        size = bits & 0x7FFFFFFF
        # Below 2^-6 the numbers are multiples of 2^-9, which is the last place of 2^14.
        small = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
        normal = (size - (120 << 23) + 0x7FFFF + ((size >> 20) & 1)) >> 20
        coded = (((bits >> 24) & 0x80) | tl.where(size < 0x3C800000, small, normal)).to(tl.uint8)
    return coded


@triton.jit
def decode(coded, FORM: tl.constexpr, dtype: tl.constexpr):
    """The values of 8 bits, without their scale. Exact in every dtype."""
    if FORM == "int8":
        values = coded.to(tl.float32).to(dtype)
    else:
        # With the bits in a half's places, its exponent is 8 too small.
        bits = coded.to(tl.int16)
        half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
        values = (half.to(tl.float32) * 256.0).to(dtype)
    return values
