"""What this machine's CPU computes fast: whether it has instructions for bfloat16, read from /proc/cpuinfo in less than a millisecond.

Imports no torch. Knows no model and no option.
"""

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# Products of bfloat16 with sums in float32: on x86 with tiles, on x86, on 64-bit Arm. The best one first.
BFLOAT16_FLAGS = ("amx_bf16", "avx512_bf16", "bf16")
X86_FLAGS, ARM_FLAGS = "flags", "Features"  # how /proc/cpuinfo names them
ROOT = Path("/")


@dataclass(frozen=True, kw_only=True)
class CpuFacts:
    """bfloat16_flag: the first of BFLOAT16_FLAGS that the CPU has; None without one, and where it is not known, as on macOS."""

    num_cores: int
    bfloat16_flag: str | None = None

    @property
    def has_bfloat16(self) -> bool:
        return self.bfloat16_flag is not None


def read_cpu(root: Path = ROOT) -> CpuFacts:
    """root: where proc/ is."""
    flags = read_cpu_flags(root / "proc/cpuinfo", names=(X86_FLAGS, ARM_FLAGS))
    return CpuFacts(
        num_cores=usable_cores(),
        bfloat16_flag=next((flag for flag in BFLOAT16_FLAGS if flag in flags), None),
    )


def read_cpu_flags(cpuinfo: Path = ROOT / "proc/cpuinfo", *, names: Sequence[str] = (X86_FLAGS,)) -> frozenset[str]:
    """names: of the line with the flags. A core's flags are those of all: the first core's are read. Empty where the file has none, or is
    not there.
    """
    with contextlib.suppress(OSError), cpuinfo.open() as lines:
        for line in lines:
            name, _, value = line.partition(":")
            if name.strip() in names:
                return frozenset(value.split())
    return frozenset()


def usable_cores() -> int:
    """Cores this process may use, which in a container is less than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
