"""The inputs of a product in 8-bit floats, in Triton: each row with its own scale. The specification is `specification.quantize_rows`.

One program reads a row once: 16 bits in, 8 out.
"""

import torch
import triton
import triton.language as tl

from workers.kernels.triton_kv import encode, find_scale, size_bits

NUM_WARPS = 8


@triton.jit
def quantize_kernel(x_ptr, values_ptr, scales_ptr, num_columns, x_stride, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    is_column = columns < num_columns
    x = tl.load(x_ptr + row * x_stride + columns, mask=is_column, other=0.0)
    scale = find_scale(tl.max(size_bits(x), axis=0), "fp8")
    tl.store(values_ptr + row * num_columns + columns, encode(x, scale, "fp8"), mask=is_column)
    tl.store(scales_ptr + row, scale)


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See `specification.quantize_rows`. The rows of x may have any stride."""
    num_rows, num_columns = x.shape
    assert x.stride(1) == 1, "a row's elements must be adjacent"
    values = torch.empty((num_rows, num_columns), dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty((num_rows, 1), dtype=torch.float32, device=x.device)
    if num_rows:
        quantize_kernel[(num_rows,)](
            x,
            values.view(torch.uint8),
            scales,
            num_columns,
            x.stride(0),
            COLUMNS=triton.next_power_of_2(num_columns),
            num_warps=NUM_WARPS,
        )
    return values, scales
