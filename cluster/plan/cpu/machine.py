"""A machine that computes on its CPU: memory, cores, and how fast they read and multiply, assumed for its kind. Knows no model."""

from dataclasses import dataclass

from cluster.plan.gpus import Link
from workers.config import Dtype

# Rates of one core, measured with both cores of a machine and rounded: reading memory, and oneDNN's products in float32 and bfloat16.
# By the flag of the instructions for bfloat16, with the name of the kind; None for CPUs without them.
KINDS = {
    "amx_bf16": ("AMX", 15e9, 112e9, 1200e9),  # bytes/s, FLOP/s in float32, in bfloat16
    "avx512_bf16": ("AVX512-BF16", 25e9, 235e9, 470e9),
    None: ("AVX2", 18e9, 60e9, 60e9),
}
# Cores share the memory's channels: 8 of DDR5-4800 have 307 GB/s, of which about two thirds are reached.
MAX_BYTES_PER_S = 200e9
# Between ranks of one machine, which share its memory.
SHARED_MEMORY = Link(name="shared memory", bytes_per_s=10e9, latency_s=40e-6)


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


def assumed(*, num_cores: int, memory_bytes: int, instructions: str | None) -> CpuMachine:
    """A machine of the kind that has these instructions for bfloat16, see KINDS. Those of other platforms count as AVX512-BF16."""
    name, bytes_per_s, float32, bfloat16 = KINDS.get(instructions, KINDS["avx512_bf16"])
    return CpuMachine(
        memory_bytes=memory_bytes,
        num_cores=num_cores,
        has_bfloat16=instructions is not None,
        bytes_per_s=min(num_cores * bytes_per_s, MAX_BYTES_PER_S),
        float32_flops_per_s=num_cores * float32,
        bfloat16_flops_per_s=num_cores * bfloat16,
        source=f"assumed for CPUs with {name}",
    )
