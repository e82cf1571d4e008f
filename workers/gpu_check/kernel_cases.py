"""The fused layers and the fixed-tile product against their torch specifications, on the GPU."""

import torch

from workers.gpu_check.report import Report
from workers.kernels.layers import layer_specification as specification
from workers.kernels.quantized_kv import KV_DTYPES, QuantizedKV

HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 4096, 14336, 32, 8, 128, 16
ROWS = (1, 3, 64, 257)
EPS = 1e-5
# Of keys in 8 bits, the share that may differ by a step.
MOST_UNEQUAL = 0.02
# Relative to the largest value: one rounding to bf16 is 2**-9.
TOLERANCE = 2**-7


def check(report: Report, device: torch.device) -> None:
    from workers.kernels.layers.add_rms_norm import add_rms_norm
    from workers.kernels.layers.matmul import matmul
    from workers.kernels.layers.rotary_kv import rotary_kv
    from workers.kernels.layers.silu_mul import silu_mul

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device).bfloat16()

    errors: dict[str, float] = {}
    for rows in ROWS:
        x, residual, weight = random(rows, HIDDEN), random(rows, HIDDEN), random(HIDDEN)
        normed = add_rms_norm(x, residual, weight=weight, eps=EPS)
        _compare(errors, "add + RMSNorm", normed, specification.add_rms_norm(x, residual, weight=weight, eps=EPS))
        gate_up = random(rows, 2 * FFN)
        _compare(errors, "SiLU x up", (silu_mul(gate_up),), (specification.silu_mul(gate_up),))
        _compare(
            errors,
            "rotary + KV write",
            _rotated(rotary_kv, rows, device),
            _rotated(specification.rotary_kv, rows, device),
        )
        product, wide = random(6144, HIDDEN), random(rows, HIDDEN)
        _compare(errors, "fixed-tile product", (matmul(wide, product),), (specification.matmul(wide, product),))
    for form, dtype in KV_DTYPES.items():
        # Keys are rounded before they are written, so a few may be the number next to the specified one. Values are exactly as specified.
        (*_, keys, values), (*_, expected_keys, expected_values) = (
            _rotated(function, ROWS[-1], device, kv_dtype=dtype) for function in (rotary_kv, specification.rotary_kv)
        )
        is_right = torch.equal(values, expected_values) and (keys != expected_keys).float().mean() < MOST_UNEQUAL
        report.check(f"KV write in {form} against torch", bool(is_right))
    for name, error in errors.items():
        report.check(f"{name} against torch", error < TOLERANCE, worst_error=error)
    x, product = random(64, HIDDEN), random(6144, HIDDEN)
    together = matmul(x, product)
    alone = torch.cat([matmul(x[i : i + 1], product) for i in range(len(x))])
    report.check("fixed-tile product: a row's bits alone and among 64", torch.equal(together, alone))


def _rotated(
    function: object, rows: int, device: torch.device, *, kv_dtype: torch.dtype = torch.bfloat16
) -> tuple[torch.Tensor, ...]:
    """Queries and both caches, from the same inputs for every function."""
    generator = torch.Generator().manual_seed(rows)
    qkv = torch.randn(rows, HEADS + 2 * KV_HEADS, HEAD_DIM, generator=generator).bfloat16().to(device)
    angle = torch.rand(rows, 1, HEAD_DIM, generator=generator).to(device)
    zeros = [
        torch.zeros(rows // BLOCK_SIZE + 2, BLOCK_SIZE, KV_HEADS, HEAD_DIM, device=device).bfloat16() for _ in "kv"
    ]
    caches = [cache if kv_dtype == cache.dtype else QuantizedKV.of(cache, kv_dtype) for cache in zeros]
    slots = (torch.randperm(rows, generator=generator) + BLOCK_SIZE).to(device)
    assert callable(function)
    q = function(qkv, (angle.cos(), angle.sin()), kv_cache=caches, slot_mapping=slots)
    return (q, *(cache if isinstance(cache, torch.Tensor) else cache.dequantize() for cache in caches))


def _compare(
    errors: dict[str, float], name: str, got: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]
) -> None:
    for one, right in zip(got, expected, strict=True):
        scale = right.float().abs().max().clamp(min=1e-6)
        error = ((one.float() - right.float()).abs().max() / scale).item()
        errors[name] = max(errors.get(name, 0.0), error) if error == error else float("inf")
