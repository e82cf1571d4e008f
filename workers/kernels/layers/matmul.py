"""The product x @ weight.T with one fixed tile for any number of rows, in Triton. The specification is `layer_specification.matmul`.

cuBLAS chooses its kernel, and may split the sum, by the number of rows, so a row's last bits depend on the batch around it. Here the tile
is chosen by the weight alone, each output element is summed by one program over in_features in steps of one size, and no program adds to
another's result. So a row has the same bits alone, in any batch and in any chunk, on one kind of GPU and with one version of Triton.
The price is at both ends: a decode step computes whole tiles of rows, and a prefill uses tiles smaller than the best.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

# Tiles of rows that share their tiles of weights run side by side, so that the L2 cache serves the second one.
GROUP_ROWS = 8


class Tile(NamedTuple):
    rows: int
    outputs: int
    depth: int  # in_features per step
    num_warps: int
    num_stages: int


def choose_tile(out_features: int, dtype: torch.dtype) -> Tile:
    """Depends on the weight only, never on the number of rows.

    Narrow weights get narrow tiles, because at few rows one program a tile of outputs must keep all multiprocessors reading:
    4096 outputs in tiles of 32 are 128 programs; an A100 has 108 multiprocessors, an H200 132.
    """
    if dtype == torch.float32:
        return Tile(rows=32, outputs=32, depth=32, num_warps=4, num_stages=3)
    # 48 KiB of shared memory with 3 stages: two programs on a multiprocessor of an A10G.
    if out_features <= 8192:
        return Tile(rows=64, outputs=32, depth=128, num_warps=4, num_stages=3)
    return Tile(rows=64, outputs=128, depth=64, num_warps=4, num_stages=3)


@triton.jit
def find_tile(num_row_tiles, num_output_tiles, GROUP_ROWS: tl.constexpr):
    """This program's (tile of rows, tile of outputs): in groups of GROUP_ROWS tiles of rows; within a group, all of its tiles of rows for
    one tile of outputs, then the next.
    """
    program, per_group = tl.program_id(0), GROUP_ROWS * num_output_tiles
    first_row_tile = program // per_group * GROUP_ROWS
    group_rows = tl.minimum(num_row_tiles - first_row_tile, GROUP_ROWS)
    return first_row_tile + program % per_group % group_rows, program % per_group // group_rows


# One compiled form for every number of rows, also 1 and multiples of 16.
@triton.jit(do_not_specialize=["num_rows"])
def matmul_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    num_rows,
    out_features,
    x_stride,
    weight_stride,
    IN_FEATURES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
):
    row_tile, output_tile = find_tile(tl.cdiv(num_rows, ROWS), tl.cdiv(out_features, OUTPUTS), GROUP_ROWS)
    rows = row_tile * ROWS + tl.arange(0, ROWS)
    outputs = output_tile * OUTPUTS + tl.arange(0, OUTPUTS)
    is_row = (rows < num_rows)[:, None]
    k = tl.arange(0, DEPTH)
    x = x_ptr + rows.to(tl.int64)[:, None] * x_stride + k[None, :]
    # Outputs past the end read the last one again and are not stored.
    weight = weight_ptr + tl.minimum(outputs, out_features - 1).to(tl.int64)[None, :] * weight_stride + k[:, None]
    total = tl.zeros((ROWS, OUTPUTS), dtype=tl.float32)
    for start in range(0, IN_FEATURES, DEPTH):
        if IN_FEATURES % DEPTH == 0:
            x_tile = tl.load(x, mask=is_row, other=0.0)
            weight_tile = tl.load(weight)
        else:
            left = IN_FEATURES - start
            x_tile = tl.load(x, mask=is_row & (k < left)[None, :], other=0.0)
            weight_tile = tl.load(weight, mask=(k < left)[:, None], other=0.0)
        # ieee: fp32 is not cut to tf32.
        total = tl.dot(x_tile, weight_tile, total, input_precision="ieee")
        x += DEPTH
        weight += DEPTH
    if HAS_BIAS:
        total += tl.load(bias_ptr + outputs, mask=outputs < out_features, other=0.0).to(tl.float32)[None, :]
    out = out_ptr + rows.to(tl.int64)[:, None] * out_features + outputs[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=is_row & (outputs < out_features)[None, :])


def matmul(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """See `layer_specification.matmul`. The rows of x and weight may have any stride; the result is contiguous."""
    num_rows, in_features = x.shape
    out_features = weight.shape[0]
    assert x.stride(1) == 1 and weight.stride(1) == 1, "a row's elements must be adjacent"
    out = torch.empty((num_rows, out_features), dtype=x.dtype, device=x.device)
    tile = choose_tile(out_features, x.dtype)
    grid = (triton.cdiv(num_rows, tile.rows) * triton.cdiv(out_features, tile.outputs),)
    matmul_kernel[grid](
        x,
        weight,
        out if bias is None else bias,
        out,
        num_rows,
        out_features,
        x.stride(0),
        weight.stride(0),
        IN_FEATURES=in_features,
        HAS_BIAS=bias is not None,
        ROWS=tile.rows,
        OUTPUTS=tile.outputs,
        DEPTH=tile.depth,
        GROUP_ROWS=GROUP_ROWS,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out
