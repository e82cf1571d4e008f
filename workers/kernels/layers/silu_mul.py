"""SiLU(gate) x up in one pass, in Triton. The specification is `layer_specification.silu_mul`. Every element is computed by itself."""

import torch
import triton
import triton.language as tl

BLOCK = 1024


@triton.jit
def silu_mul_kernel(gate_up_ptr, out_ptr, stride, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < size
    gate = tl.load(gate_up_ptr + row * stride + columns, mask=mask, other=0.0)
    up = tl.load(gate_up_ptr + row * stride + size + columns, mask=mask, other=0.0)
    silu = gate.to(tl.float32) / (1.0 + tl.exp(-gate.to(tl.float32)))
    # The specification rounds here too.
    product = silu.to(gate.dtype).to(tl.float32) * up.to(tl.float32)
    tl.store(out_ptr + row * size + columns, product.to(gate.dtype), mask=mask)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """See `layer_specification.silu_mul`. Rows may have any stride; the result is contiguous."""
    num_tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    assert gate_up.stride(1) == 1, "a row's elements must be adjacent"
    out = torch.empty((num_tokens, size), dtype=gate_up.dtype, device=gate_up.device)
    grid = (num_tokens, triton.cdiv(size, BLOCK))
    silu_mul_kernel[grid](gate_up, out, gate_up.stride(0), size, BLOCK=BLOCK, num_warps=4)
    return out
