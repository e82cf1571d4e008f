"""Products with weights of 8 or 4 bits on the GPU: right, each row's bits alone and among others, and how fast beside what is possible."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from workers.gpu_check.ceilings import SHAPES_7B, Ceilings, seconds
from workers.gpu_check.report import Report
from workers.kernels.grouped import specification
from workers.quant.at_load import LARGEST_FLOAT8, round_to_float8, round_to_groups
from workers.quant.dense import DENSE
from workers.quant.quantized import Float8Tensor, QuantizedTensor
from workers.quant.stored import Matrix

# Relative to the largest value: one rounding to bf16 is 2**-9, and for many rows the weights are rounded, too.
TOLERANCE = 2**-7
FLOAT8_TOLERANCE = 2**-4  # where inputs are rounded to 3 bits of mantissa
ROWS = (1, 3, 16, 17, 64, 200)
BITS_ROWS = 75
# Both products of many rows are measured, so that the number of rows where they meet can be set: MAX_FUSED_ROWS.
MEASURED_ROWS = (1, 16, 64, 128, 256, 512)
SHARE_OF_MEMORY = 0.6  # of the copy's bytes a second, that few rows should reach


@dataclass(frozen=True)
class Shape:
    out_features: int
    in_features: int


SHAPE = Shape(4096, 4096)


def check(report: Report, device: torch.device, *, shape: Shape = SHAPE) -> None:
    from workers.quant.pack_cuda import Float8Matrix, GroupedMatrix, cuda_pack

    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    for name, values in stored_weights(shape, device).items():
        matrix = cuda_pack(DENSE, capability=capability)(values, torch.bfloat16, device)
        weight, worst = values.dequantize(), 0.0
        for num_rows in ROWS:
            x = torch.randn(num_rows, shape.in_features, device=device).bfloat16()
            worst = max(worst, _error(matrix.multiply(x), x.float() @ weight.T))
        tolerance = FLOAT8_TOLERANCE if isinstance(matrix, Float8Matrix) else TOLERANCE
        report.check(f"{name}: {shape.out_features} x {shape.in_features}", worst < tolerance, worst_error=worst)
        fixed = cuda_pack(DENSE, capability=capability, deterministic=True)(values, torch.bfloat16, device)
        assert isinstance(fixed, GroupedMatrix)
        x = torch.randn(BITS_ROWS, shape.in_features, device=device).bfloat16()
        together = fixed.multiply(x)
        alone = torch.cat([fixed.multiply(row[None]) for row in x])
        chunks = torch.cat([fixed.multiply(part) for part in x.split(29)])
        is_right = torch.equal(together, alone) and torch.equal(together, chunks)
        report.check(f"{name}: deterministic bits alone, in chunks and among {BITS_ROWS}", is_right)
    _check_inputs(report, device, shape)


def stored_weights(shape: Shape, device: torch.device) -> Mapping[str, QuantizedTensor | Float8Tensor]:
    """A matrix in each form: what checkpoints have, and what --quantization makes."""
    weight = torch.randn(shape.out_features, shape.in_features, device=device) * 0.02
    int4, int8, float8 = (
        round_to_groups(weight, num_bits=4),
        round_to_groups(weight, num_bits=8),
        round_to_float8(weight),
    )
    with_minima = QuantizedTensor(
        values=int4.values + 8, scales=int4.scales, minima=(-8 * int4.scales.float()).half(), num_bits=4
    )
    of_128 = int4.scales[:, ::4].float()
    blocks = Float8Tensor(
        values=float8.values, scales=float8.scales.expand(-1, shape.in_features // 128), block_size=128
    )
    return {
        "int4 in groups of 32": int4,
        "int4 with minima": with_minima,
        "int4 with float32 scales and minima of 128": QuantizedTensor(
            values=with_minima.values, scales=of_128, minima=-8 * of_128, num_bits=4
        ),
        "int8 in groups of 32": int8,
        "int8 with a scale for each row": QuantizedTensor(
            values=int8.values, scales=int8.scales[:, :1].float(), minima=None, num_bits=8
        ),
        "float8": float8,
        # Of inputs up to 6 times their standard deviation.
        "float8 with a static scale of inputs": replace(float8, input_scale=torch.tensor(6 / LARGEST_FLOAT8)),
        "float8 in blocks of 128": blocks,
    }


def measure(
    report: Report, ceilings: Ceilings, device: torch.device, *, shapes: Sequence[tuple[int, int]] = SHAPES_7B
) -> None:
    """All matrices of a 7B layer, and the head, one after the other, so that no weight stays in the cache."""
    from workers.quant.pack_cuda import cuda_pack

    capability = torch.cuda.get_device_capability(device)
    fused = cuda_pack(DENSE, capability=capability, max_fused_rows=1 << 30)
    by_library = cuda_pack(DENSE, capability=capability, max_fused_rows=0)
    for name in ("int4 in groups of 32", "int8 in groups of 32", "float8"):
        stored = [stored_weights(Shape(*shape), device)[name] for shape in shapes]
        both = {"": [fused(v, torch.bfloat16, device) for v in stored]}
        if name != "float8":
            both[" in 16 bits first"] = [by_library(v, torch.bfloat16, device) for v in stored]
        for (how, matrices), num_rows in ((item, n) for item in both.items() for n in MEASURED_ROWS):
            if not report.has_time:
                report.add(f"{name}{how}, {num_rows} rows", "left out", "the time is up")
                continue
            inputs = [torch.randn(num_rows, shape[1], device=device).bfloat16() for shape in shapes]
            took_s = seconds(partial(_multiply_all, matrices, inputs))
            num_bytes = sum(t.nbytes for matrix in matrices for t in matrix.tensors)
            flops = sum(2.0 * num_rows * out * in_features for out, in_features in shapes)
            limit_s = max(num_bytes / ceilings.bytes_per_s, flops / ceilings.flops_per_s)
            figures = {"us": took_s * 1e6, "gb_per_s": num_bytes / took_s / 1e9, "tflops": flops / took_s / 1e12}
            line, share = f"{name}{how}, {num_rows} row{'s'[: num_rows != 1]}", limit_s / took_s
            if num_rows == 1 and not how:
                report.target(line, share, SHARE_OF_MEMORY, **figures)
            else:
                report.add(line, "measured", f"{share:.0%} of the limit", share=share, **figures)
        torch.cuda.empty_cache()


def _check_inputs(report: Report, device: torch.device, shape: Shape) -> None:
    from workers.kernels.grouped.quantize_rows import quantize_rows

    x = torch.randn(64, shape.in_features, device=device).bfloat16()
    got, expected = quantize_rows(x), specification.quantize_rows(x)
    is_right = torch.equal(got[0].view(torch.uint8), expected[0].view(torch.uint8)) and torch.equal(got[1], expected[1])
    report.check("inputs in float8 have the bits of the specification", is_right)


def _multiply_all(matrices: Sequence[Matrix], inputs: Sequence[torch.Tensor]) -> None:
    for matrix, x in zip(matrices, inputs, strict=True):
        matrix.multiply(x)


def _error(product: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative to the largest value; NaN is as wrong as can be, and so is a device that computes nothing."""
    largest, error = exact.abs().max().item(), (product.float() - exact).abs().max().item()
    return error / largest if error == error and largest > 0 else float("inf")
