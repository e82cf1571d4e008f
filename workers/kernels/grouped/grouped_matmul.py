"""The product x @ weight.T with weights of 8 or 4 bits, in Triton, for few rows of x. The specification is `specification.grouped_matmul`.

For few rows the time is that of reading the weights once. A weight of 4 bits with a half as scale of 32 takes 4.5 bits, 7 billion of them
3.9 GB: 2.5 ms from the memory of an A100 (1,555 GB/s), 6.6 ms of an A10G (600), 1.2 ms of an H100 (3,350), where 16 bits take 3.6 times as
long. So that nothing but the memory limits it:

- A program's next piece of weights is one run of memory, and is copied to shared memory in vectors of 16 bytes while the last is computed.
- A weight becomes a float with one `and`, one `or` and one multiply-add: its bits, put into the mantissa of 2^23, are added to 2^23.
  No conversion of integers, which a multiprocessor of an A100 does at a quarter of the speed.
- Whole numbers are multiplied, exactly, and the sums of a group are multiplied by its scale: once for 32 weights, not once a weight.

Each output is summed by one program over in_features in steps of one size, and no program adds to another's result. With `deterministic`
the tile, too, is chosen by the weight alone, so a row has the same bits alone, in any batch and in any chunk.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from workers.kernels.grouped.packed import WORDS, PackedWeight
from workers.kernels.layers.matmul import GROUP_ROWS, find_tile

# In the mantissa of this number, 2^23, the last bit is worth 1.
EXPONENT = tl.constexpr(0x4B000000)
TWO_23 = tl.constexpr(8388608.0)
FLOAT8 = tl.constexpr(-1)  # instead of an offset


class Tile(NamedTuple):
    rows: int
    outputs: int
    num_warps: int
    num_stages: int


def choose_tile(num_rows: int, out_features: int, *, deterministic: bool) -> Tile:
    """16 rows are the least that the GPU multiplies at once. With more than 32 a thread runs out of registers, so the weights are taken
    apart once for each 32 rows. Narrow weights get narrow tiles, so that there is a program for each multiprocessor: see layers/matmul.py.
    """
    rows = 16 if num_rows <= 16 and not deterministic else 32
    if out_features <= 8192:
        # Few programs must have much under way: 6 stages of 2 KiB of weights.
        return Tile(rows=rows, outputs=32, num_warps=4, num_stages=6 if rows == 16 else 5)
    return Tile(rows=rows, outputs=64, num_warps=4, num_stages=4)


@triton.jit
def take_field(words, SHIFT: tl.constexpr, NUM_BITS: tl.constexpr, OFFSET: tl.constexpr):
    """Of each word the value whose lowest bit is SHIFT, as fp32. words: int32. Every step is exact."""
    if OFFSET == FLOAT8:
        # Sign, 4 bits of exponent and 3 of mantissa move to their place in fp32, whose exponents are larger by 120.
        sign = (words & (0x80 << SHIFT)) << (24 - SHIFT)
        rest = (words & (0x7F << SHIFT)) << (20 - SHIFT)
        value = (sign | rest).to(tl.float32, bitcast=True) * 1.329227995784916e36
    else:
        bits = (words & (((1 << NUM_BITS) - 1) << SHIFT)) | EXPONENT
        value = bits.to(tl.float32, bitcast=True) * (1.0 / (1 << SHIFT)) - (TWO_23 / (1 << SHIFT) + OFFSET)
    return value


@triton.jit
def take_half(words, SHIFT: tl.constexpr):
    """Of each integer the 16 bits from SHIFT on, a half, as fp32."""
    return (words >> SHIFT).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def load_scales(
    scales_ptr,
    minima_ptr,
    first_group,
    row_stride,
    outputs,
    GROUPS: tl.constexpr,
    HAS_MINIMA: tl.constexpr,
    HALVES: tl.constexpr,
):
    """What `scale_of` and `minimum_of` read, of GROUPS groups from the first one on. Halves without minima lie GROUPS in an integer."""
    if HALVES and not HAS_MINIMA:
        loaded = (tl.load(scales_ptr + first_group // GROUPS * row_stride + outputs),)
    else:
        # mypy wants tuples to keep their length, and ruff wants a star, which Triton does not know.
        loaded = ()  # type: ignore[assignment]
        for group in tl.static_range(GROUPS):
            at = (first_group + group) * row_stride + outputs
            loaded = loaded + (tl.load(scales_ptr + at),)  # type: ignore[assignment]  # noqa: RUF005
            if HAS_MINIMA and not HALVES:
                loaded = loaded + (tl.load(minima_ptr + at),)  # type: ignore[assignment]  # noqa: RUF005
    return loaded


@triton.jit
def scale_of(loaded, GROUP: tl.constexpr, HAS_MINIMA: tl.constexpr, HALVES: tl.constexpr):
    if not HALVES:
        scale = loaded[GROUP * 2 if HAS_MINIMA else GROUP]
    elif HAS_MINIMA:
        scale = take_half(loaded[GROUP], 0)
    else:
        scale = take_half(loaded[0], 16 * GROUP)
    return scale


@triton.jit
def minimum_of(loaded, GROUP: tl.constexpr, HALVES: tl.constexpr):
    return take_half(loaded[GROUP], 16) if HALVES else loaded[GROUP * 2 + 1]


# One compiled form for every number of rows, also 1 and multiples of 16.
@triton.jit(do_not_specialize=["num_rows"])
def grouped_kernel(
    x_ptr,
    words_ptr,
    scales_ptr,
    minima_ptr,
    bias_ptr,
    out_ptr,
    num_rows,
    out_features,
    x_stride,
    IN_FEATURES: tl.constexpr,
    WORDS: tl.constexpr,
    NUM_BITS: tl.constexpr,
    OFFSET: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HAS_MINIMA: tl.constexpr,
    HALVES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
):
    FIELDS: tl.constexpr = 16 // NUM_BITS
    BLOCK: tl.constexpr = WORDS * FIELDS
    NUM_BLOCKS: tl.constexpr = (IN_FEATURES + BLOCK - 1) // BLOCK
    IS_ONE_GROUP: tl.constexpr = GROUP_SIZE >= IN_FEATURES
    GROUPS: tl.constexpr = 1 if GROUP_SIZE > BLOCK or IS_ONE_GROUP else BLOCK // GROUP_SIZE  # of a block

    row_tile, output_tile = find_tile(tl.cdiv(num_rows, ROWS), tl.cdiv(out_features, OUTPUTS), GROUP_ROWS)
    rows = row_tile * ROWS + tl.arange(0, ROWS)
    outputs = output_tile * OUTPUTS + tl.arange(0, OUTPUTS)
    is_row = (rows < num_rows)[:, None]
    # Outputs past the end read the last one again and are not stored.
    safe = tl.minimum(outputs, out_features - 1)
    k = tl.arange(0, WORDS)
    x = x_ptr + rows.to(tl.int64)[:, None] * x_stride + k[None, :]
    words = words_ptr + safe[None, :] * WORDS + k[:, None]
    total = tl.zeros((ROWS, OUTPUTS), dtype=tl.float32)
    part = total
    sums = total
    ones = tl.full((WORDS, OUTPUTS), 1.0, dtype=tl.float32).to(x_ptr.dtype.element_ty)
    loaded = load_scales(scales_ptr, minima_ptr, 0, out_features, safe, GROUPS, HAS_MINIMA, HALVES)
    for block in range(NUM_BLOCKS):
        block_words = tl.load(words).to(tl.int32)
        # A step ahead: the compiler copies early only what a multiplication waits for.
        following = loaded
        if not IS_ONE_GROUP:
            first_group = tl.minimum(block + 1, NUM_BLOCKS - 1) * BLOCK // GROUP_SIZE
            following = load_scales(scales_ptr, minima_ptr, first_group, out_features, safe, GROUPS, HAS_MINIMA, HALVES)
        for field in tl.static_range(FIELDS):
            if IN_FEATURES % BLOCK == 0:
                x_tile = tl.load(x + field * WORDS, mask=is_row, other=0.0)
            else:
                is_input = block * BLOCK + field * WORDS < IN_FEATURES
                x_tile = tl.load(x + field * WORDS, mask=is_row & is_input, other=0.0)
            if field * WORDS % GROUP_SIZE == 0 and not IS_ONE_GROUP:
                part = tl.zeros((ROWS, OUTPUTS), dtype=tl.float32)
                sums = part
            values = take_field(block_words, NUM_BITS * field, NUM_BITS, OFFSET).to(x_tile.dtype)
            # ieee: fp32 is not cut to tf32.
            part = tl.dot(x_tile, values, part, input_precision="ieee")
            if HAS_MINIMA:
                # The sum of a group's inputs, in each column.
                sums = tl.dot(x_tile, ones, sums, input_precision="ieee")
            if ((field + 1) * WORDS % GROUP_SIZE == 0 or field + 1 == FIELDS) and not IS_ONE_GROUP:
                total += part * scale_of(loaded, field * WORDS // GROUP_SIZE, HAS_MINIMA, HALVES)[None, :]
                if HAS_MINIMA:
                    total += sums * minimum_of(loaded, field * WORDS // GROUP_SIZE, HALVES)[None, :]
        x += BLOCK
        words += out_features * WORDS
        loaded = following
    if IS_ONE_GROUP:
        total = part * scale_of(loaded, 0, HAS_MINIMA, HALVES)[None, :]
        if HAS_MINIMA:
            total += sums * minimum_of(loaded, 0, HALVES)[None, :]
    if HAS_BIAS:
        total += tl.load(bias_ptr + safe).to(tl.float32)[None, :]
    out = out_ptr + rows.to(tl.int64)[:, None] * out_features + outputs[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=is_row & (outputs < out_features)[None, :])


def grouped_matmul(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None, *, deterministic: bool = False
) -> torch.Tensor:
    """See `specification.grouped_matmul`. The rows of x may have any stride; the result is contiguous."""
    num_rows, in_features = x.shape
    out_features = weight.out_features
    assert x.stride(1) == 1 and in_features == weight.in_features, "a row's elements must be adjacent, and all there"
    out = torch.empty((num_rows, out_features), dtype=x.dtype, device=x.device)
    tile = choose_tile(num_rows, out_features, deterministic=deterministic)
    grid = (triton.cdiv(num_rows, tile.rows) * triton.cdiv(out_features, tile.outputs),)
    grouped_kernel[grid](
        x,
        weight.words,
        weight.scales,
        weight.scales if weight.minima is None else weight.minima,
        out if bias is None else bias,
        out,
        num_rows,
        out_features,
        x.stride(0),
        IN_FEATURES=in_features,
        WORDS=WORDS,
        NUM_BITS=weight.num_bits,
        OFFSET=FLOAT8.value if weight.is_float8 else weight.offset,
        GROUP_SIZE=weight.group_size,
        HAS_MINIMA=weight.has_minima,
        HALVES=weight.halves,
        HAS_BIAS=bias is not None,
        ROWS=tile.rows,
        OUTPUTS=tile.outputs,
        GROUP_ROWS=GROUP_ROWS,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out
