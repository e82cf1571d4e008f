"""What this GPU reaches at best: bytes copied a second, and bf16 products at the shapes of a 7B model. The limits of all other figures."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import functional

from workers.gpu_check.report import Report

# [out_features, in_features]: qkv, output, gate and up, down, head.
SHAPES_7B = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (32768, 4096))
PREFILL_ROWS = 4096
COPY_BYTES = 1 << 30


@dataclass(frozen=True)
class Ceilings:
    bytes_per_s: float
    flops_per_s: float


def measure(report: Report, device: torch.device) -> Ceilings:
    free, _ = torch.cuda.mem_get_info(device)
    num_bytes = min(COPY_BYTES, free // 4)
    source, target = (torch.empty(num_bytes, dtype=torch.uint8, device=device) for _ in range(2))
    # A copy reads and writes each byte.
    bytes_per_s = 2 * num_bytes / seconds(partial(target.copy_, source))
    del source, target
    flops, took_s = 0.0, 0.0
    for out_features, in_features in SHAPES_7B:
        weight = torch.randn(out_features, in_features, dtype=torch.bfloat16, device=device)
        x = torch.randn(PREFILL_ROWS, in_features, dtype=torch.bfloat16, device=device)
        flops += 2.0 * PREFILL_ROWS * out_features * in_features
        took_s += seconds(partial(functional.linear, x, weight))
    ceilings = Ceilings(bytes_per_s, flops / took_s)
    report.add("copy", "measured", gb_per_s=ceilings.bytes_per_s / 1e9)
    report.add("bf16 products at 7B shapes, 4,096 rows", "measured", tflops=ceilings.flops_per_s / 1e12)
    return ceilings


def seconds(run: Callable[[], object], *, repeats: int = 10) -> float:
    """The median time of `run` on the device, after two runs to warm up."""
    for _ in range(2):
        run()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return sorted(times)[len(times) // 2]
