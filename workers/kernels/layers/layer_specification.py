"""What the layers' kernels compute, in plain torch: the specification of each, with its signature, and what runs on the CPU.

Every result is rounded once, to the dtype of its input; where a kernel rounds in between, it is said here. On the CPU in fp32 a row's
result is bit for bit independent of the other rows. The Triton forms have a file each in this folder, and need a GPU; this file needs
torch only.
"""

import torch
from torch.nn import functional

from workers.kernels import quantized_kv
from workers.kernels.quantized_kv import Cache


def lookup_rows(table: torch.Tensor, indices: torch.Tensor, *, first: int = 0) -> torch.Tensor:
    """Row index - first of the table for each index, zeros where it has no such row.

    table: [num_rows, size]; indices: [n] int64 -> [n, size].
    """
    rows = indices - first
    missing = (rows < 0) | (rows >= table.shape[0])
    found = functional.embedding(rows.masked_fill(missing, 0), table)
    return found.masked_fill_(missing.unsqueeze(-1), 0)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor | None, *, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(normed, total): total = residual + x, rounded to the dtype of x; normed = total / rms(total) * weight, computed in fp32.

    x, residual: [num_tokens, hidden_size]; weight: [hidden_size]. Without a residual the total is x itself.
    """
    total = x if residual is None else residual + x
    return functional.rms_norm(total, weight.shape, weight, eps), total


def rotary_kv(
    qkv: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor],
    *,
    kv_cache: tuple[Cache, Cache],
    slot_mapping: torch.Tensor,
) -> torch.Tensor:
    """Rotates queries and keys, writes keys and values to their slots (block * block_size + offset), and returns the queries.

    qkv: [num_tokens, num_heads + 2 * num_kv_heads, head_dim], query heads first, value heads last, rows of any stride;
    angles: cos and sin, each [num_tokens, 1, head_dim], fp32, see `RotaryEmbedding.angles`; kv_cache: keys and values, see
    `quantized_kv.Cache`; slot_mapping: [num_tokens] int64.
    Returns [num_tokens, num_heads, head_dim], rows of any stride.
    """
    num_kv_heads = kv_cache[0].shape[2]
    num_heads = qkv.shape[1] - 2 * num_kv_heads
    qk, v = qkv.split((num_heads + num_kv_heads, num_kv_heads), dim=1)
    q, k = rotate(qk, *angles).split((num_heads, num_kv_heads), dim=1)
    for cache, new in zip(kv_cache, (k, v), strict=True):
        quantized_kv.write(cache, new, slot_mapping)
    return q


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x * cos + roll(x, head_dim / 2) * sin, computed in fp32. x: [num_tokens, num_heads, head_dim], any dtype."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin).to(x.dtype)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up; silu(gate) is rounded to the dtype first. gate_up: [num_tokens, 2 * size], gate first -> [num_tokens, size]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return silu(gate) * up


def silu(x: torch.Tensor) -> torch.Tensor:
    """x * sigmoid(x).

    On the CPU torch's own silu computes the last elements of each thread's part with another exponential, with other last bits, and
    where the parts end depends on the number of rows. `exp` computes every element alike.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return functional.silu(x)
    return x / x.neg().exp_().add_(1.0)


def matmul(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x @ weight.T + bias, summed in fp32. x: [num_tokens, in_features]; weight: [out_features, in_features]; bias: [out_features]."""
    product = x.float() @ weight.float().T
    return (product if bias is None else product + bias.float()).to(x.dtype)
