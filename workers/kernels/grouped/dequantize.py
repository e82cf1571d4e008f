"""Weights of 8 or 4 bits as plain numbers, in Triton. The specification is `specification.dequantize`.

For many rows of x: their product is computed by the library from what this writes. It reads 4.5 bits a weight and writes 16.
"""

import torch
import triton
import triton.language as tl

from workers.kernels.grouped.grouped_matmul import FLOAT8, load_scales, minimum_of, scale_of, take_field
from workers.kernels.grouped.packed import WORDS, PackedWeight, block_size

OUTPUTS = 32  # rows of the weight in one program
NUM_WARPS = 4


@triton.jit(do_not_specialize=["first_row", "num_rows"])
def dequantize_kernel(
    words_ptr,
    scales_ptr,
    minima_ptr,
    out_ptr,
    first_row,
    num_rows,
    out_features,
    out_stride,
    IN_FEATURES: tl.constexpr,
    WORDS: tl.constexpr,
    NUM_BITS: tl.constexpr,
    OFFSET: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HAS_MINIMA: tl.constexpr,
    HALVES: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    FIELDS: tl.constexpr = 16 // NUM_BITS
    BLOCK: tl.constexpr = WORDS * FIELDS
    IS_ONE_GROUP: tl.constexpr = GROUP_SIZE >= IN_FEATURES
    GROUPS: tl.constexpr = 1 if GROUP_SIZE > BLOCK or IS_ONE_GROUP else BLOCK // GROUP_SIZE

    block = tl.program_id(0)
    rows = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    outputs = tl.minimum(first_row + rows, out_features - 1)
    k = tl.arange(0, WORDS)
    words = words_ptr + block.to(tl.int64) * out_features * WORDS + outputs[:, None] * WORDS + k[None, :]
    block_words = tl.load(words).to(tl.int32)
    first_group = 0 if IS_ONE_GROUP else block * BLOCK // GROUP_SIZE
    loaded = load_scales(scales_ptr, minima_ptr, first_group, out_features, outputs, GROUPS, HAS_MINIMA, HALVES)
    for field in tl.static_range(FIELDS):
        weight = take_field(block_words, NUM_BITS * field, NUM_BITS, OFFSET)
        # Of one group the first, although its size may be that of less than a block.
        weight *= scale_of(loaded, 0 if IS_ONE_GROUP else field * WORDS // GROUP_SIZE, HAS_MINIMA, HALVES)[:, None]
        if HAS_MINIMA:
            weight += minimum_of(loaded, 0 if IS_ONE_GROUP else field * WORDS // GROUP_SIZE, HALVES)[:, None]
        inputs = block * BLOCK + field * WORDS + k
        out = out_ptr + rows.to(tl.int64)[:, None] * out_stride + inputs[None, :]
        is_there = (rows < num_rows)[:, None] & (inputs < IN_FEATURES)[None, :]
        tl.store(out, weight.to(out_ptr.dtype.element_ty), mask=is_there)


def dequantize(weight: PackedWeight, out: torch.Tensor, *, first_row: int = 0) -> None:
    """See `specification.dequantize`."""
    num_rows, in_features = out.shape
    assert in_features == weight.in_features and out.stride(1) == 1 and first_row + num_rows <= weight.out_features
    grid = (triton.cdiv(in_features, block_size(weight.num_bits)), triton.cdiv(num_rows, OUTPUTS))
    dequantize_kernel[grid](
        weight.words,
        weight.scales,
        weight.scales if weight.minima is None else weight.minima,
        out,
        first_row,
        num_rows,
        weight.out_features,
        out.stride(0),
        IN_FEATURES=in_features,
        WORDS=WORDS,
        NUM_BITS=weight.num_bits,
        OFFSET=FLOAT8.value if weight.is_float8 else weight.offset,
        GROUP_SIZE=weight.group_size,
        HAS_MINIMA=weight.has_minima,
        HALVES=weight.halves,
        OUTPUTS=OUTPUTS,
        num_warps=NUM_WARPS,
    )
