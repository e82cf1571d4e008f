"""A machine that computes on its CPU: memory, cores, and how fast they read and multiply, either assumed for its kind or measured.

Knows no model. Measuring needs numpy and about a second.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from cluster.plan.gpus import Link
from workers.config import Dtype
from workers.device.cpu import CpuFacts

# Rates of one core, measured on machines with two (benchmarks/README.md), and rounded. FLOP/s count a multiplication and an addition as two.
AVX512_BF16 = (25e9, 235e9, 470e9)  # bytes/s, float32, bfloat16
AVX2 = (18e9, 60e9, 60e9)
# Cores share the memory's channels: 8 of DDR5-4800 have 307 GB/s, of which about two thirds are reached.
MAX_BYTES_PER_S = 200e9
# Between ranks of one machine, which share its memory.
SHARED_MEMORY = Link(name="shared memory", bytes_per_s=10e9, latency_s=40e-6)
MEASURED_BYTES = 256 << 20  # out of every cache
MEASURED_SIZE = 2048
NUM_MEASUREMENTS = 3


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What one form of weights is computed with: see roofline.Processor."""

    bytes_per_s: float
    flops_per_s: float
    link: Link = SHARED_MEMORY


@dataclass(frozen=True, kw_only=True)
class CpuMachine:
    """bytes_per_s: all cores reading. flops_per_s: all cores. source: where the rates come from, in words."""

    memory_bytes: int
    num_cores: int
    has_bfloat16: bool
    bytes_per_s: float
    float32_flops_per_s: float
    bfloat16_flops_per_s: float
    source: str

    def rates(self, dtype: Dtype) -> Rates:
        """Half types without instructions are converted to float32 where they are multiplied."""
        flops = self.bfloat16_flops_per_s if dtype == "bfloat16" and self.has_bfloat16 else self.float32_flops_per_s
        return Rates(bytes_per_s=self.bytes_per_s, flops_per_s=flops)


def assumed(cpu: CpuFacts, *, memory_bytes: int, has_bfloat16: bool) -> CpuMachine:
    """A machine with `cpu.num_cores` cores of this machine's kind."""
    name, rates = ("AVX512-BF16", AVX512_BF16) if has_bfloat16 else ("AVX2", AVX2)
    bytes_per_s, float32, bfloat16 = rates
    cores = cpu.num_cores
    return CpuMachine(
        memory_bytes=memory_bytes,
        num_cores=cores,
        has_bfloat16=has_bfloat16,
        bytes_per_s=min(cores * bytes_per_s, MAX_BYTES_PER_S),
        float32_flops_per_s=cores * float32,
        bfloat16_flops_per_s=cores * bfloat16,
        source=f"assumed for {cores} cores with {name}; --measure measures this machine",
    )


def measured(cpu: CpuFacts, *, memory_bytes: int, has_bfloat16: bool) -> CpuMachine:
    """This machine. Its rate in bfloat16, in which numpy cannot multiply, is assumed to be twice that in float32."""
    import numpy as np  # late: the other commands that import this module do not need it

    values = np.ones(MEASURED_BYTES // 4, dtype=np.float32)
    matrix = np.ones((MEASURED_SIZE, MEASURED_SIZE), dtype=np.float32)
    read_s = _fastest_s(lambda: np.dot(values, values))
    multiply_s = _fastest_s(lambda: matrix @ matrix)
    flops_per_s = 2 * MEASURED_SIZE**3 / multiply_s
    return CpuMachine(
        memory_bytes=memory_bytes,
        num_cores=cpu.num_cores,
        has_bfloat16=has_bfloat16,
        bytes_per_s=values.nbytes / read_s,
        float32_flops_per_s=flops_per_s,
        bfloat16_flops_per_s=flops_per_s * (2 if has_bfloat16 else 1),
        source="measured on this machine with numpy, in float32",
    )


def _fastest_s(work: Callable[[], object]) -> float:
    """Other processes only make it slower. The first run touches the memory."""
    work()
    times = []
    for _ in range(NUM_MEASUREMENTS):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)
