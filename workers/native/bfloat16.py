"""Whether ranks on this machine compute bfloat16 fast and with the same bits on every replica: what --dtype auto asks every node. And
whether they keep weights in float32 as bfloat16.
"""

from dataclasses import dataclass

from workers.device.cpu import BFLOAT16_FLAGS, CpuFacts, read_cpu
from workers.native.library import NativeLibrary, NoNativeLibrary, load_library
from workers.native.variants import VARIANTS


@dataclass(frozen=True, kw_only=True)
class Bfloat16Support:
    """instructions: their flag, such as avx512_bf16; None without any. obstacle: what the machine lacks, to follow its name."""

    instructions: str | None = None
    obstacle: str | None = None


def bfloat16_support() -> Bfloat16Support:
    """This machine's. Raises ConfigError as `load_library`."""
    return judge_support(read_cpu(), load_library())


def keeps_narrow_weights() -> bool:
    """Whether ranks on this machine keep matrices in float32 as bfloat16, where that holds them exactly: all compiled kernels do."""
    return isinstance(load_library(), NativeLibrary)


def judge_support(cpu: CpuFacts, library: NativeLibrary | NoNativeLibrary) -> Bfloat16Support:
    """The CPU needs the instructions, and the compiled kernels have to use them: torch's own products in bfloat16 give a row other bits
    in another batch.
    """
    if not cpu.has_bfloat16:
        return Bfloat16Support(obstacle="has no instructions for bfloat16.")
    if isinstance(library, NoNativeLibrary):
        return Bfloat16Support(obstacle=f"has no compiled kernels for bfloat16. {library.reason}")
    flags = next(variant.cpu_flags for variant in VARIANTS if variant.name == library.variant)
    used = next((flag for flag in BFLOAT16_FLAGS if flag in flags), None)
    if used is None:
        return Bfloat16Support(
            obstacle=f"uses the kernels for {library.variant}, which has no instructions for bfloat16."
        )
    return Bfloat16Support(instructions=used)
