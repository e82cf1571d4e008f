"""The instruction sets that the kernels are compiled for, and the names and marks of the libraries. Compiles nothing, loads nothing.

Each variant is a library of its own. In one library, the linker would keep one copy of a template or inline function that both
variants use, so AVX512 instructions could run on a CPU that has none.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent
COMMON_FLAGS = (
    *("-O3", "-std=c++17", "-fPIC", "-fopenmp", "-fvisibility=hidden"),
    # GCC 12 warns of its own AVX-512 headers: https://gcc.gnu.org/bugzilla/show_bug.cgi?id=105593
    *("-Wall", "-Wno-maybe-uninitialized", "-Wno-uninitialized"),
    # Same bits in every build: a product and a sum become one instruction only where the source says so.
    *("-ffp-contract=off", "-fno-math-errno"),
)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """`cpu_flags`: what /proc/cpuinfo must list. `compiler_flags`: GCC's options for these instructions."""

    name: str
    cpu_flags: tuple[str, ...]
    compiler_flags: tuple[str, ...]

    def library_path(self, folder: Path = FOLDER) -> Path:
        return folder / f"libtramontane_cpu_{self.name}.so"


AVX2 = Variant(name="avx2", cpu_flags=("avx2", "fma", "f16c"), compiler_flags=("-mavx2", "-mfma", "-mf16c"))
AVX512 = Variant(
    name="avx512",
    cpu_flags=("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "avx512_bf16", *AVX2.cpu_flags),
    compiler_flags=(
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mavx512bf16"),
        *("-mfma", "-mf16c"),
    ),
)
AMX = Variant(
    name="amx",
    cpu_flags=("amx_tile", "amx_bf16", "amx_int8", "avx512_fp16", *AVX512.cpu_flags),
    compiler_flags=("-mamx-tile", "-mamx-bf16", "-mamx-int8", *AVX512.compiler_flags),
)
# The best one first.
VARIANTS = (AMX, AVX512, AVX2)

# What a library shows to others; templates of the C++ library stay inside.
EXPORTS = "{ global: tramontane_*; local: *; };"


def kernel_sources(folder: Path = FOLDER) -> list[Path]:
    return sorted(folder.rglob("*.cpp"))


def build_id(variant: Variant, folder: Path = FOLDER) -> str:
    """16 hex digits that change with a source, a header or a flag. A library with another one was built from other sources."""
    digest = hashlib.sha256(" ".join((variant.name, *COMMON_FLAGS, *variant.compiler_flags)).encode())
    for path in sorted([*kernel_sources(folder), *folder.rglob("*.h")]):
        content = path.read_bytes()
        digest.update(f"\0{path.name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:16]


def is_current(variant: Variant, folder: Path = FOLDER) -> bool:
    """Whether the library is there and was built from the sources next to it. Reads its mark without loading it."""
    try:
        content = variant.library_path(folder).read_bytes()
    except FileNotFoundError:
        return False
    return build_mark(build_id(variant, folder)) in content


def build_mark(identifier: str) -> bytes:
    """What build_mark.cpp puts into a library."""
    return f"TRAMONTANE_BUILD={identifier}".encode()
