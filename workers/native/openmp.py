"""The OpenMP runtime that the kernels share with torch: one pool of threads, one number of threads, for both.

torch's wheels bring a libgomp of their own. A second one in the process would have its own threads, which `torch.set_num_threads`
does not reach and which would compete with torch's for the cores.
"""

import ctypes
import functools
import importlib.util
import os
import sys
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

TORCH_LIBRARY = "libtorch_cpu.so"
ENTRY_POINT = "GOMP_parallel"  # what GCC's code calls; libiomp5 and libomp have it too


# Polls of a thread of libgomp that waits for the others, each some 50 ns, before it sleeps. With the default of 300,000, which is 15 ms,
# waiting threads use up their share of a core that another program wants, too, and do not get it when there is work again: with one of
# two cores taken, a stream is slower by a factor of ten.
NUM_SPINS = 5000
SPIN_VARIABLE = "GOMP_SPINCOUNT"


class _SymbolInfo(ctypes.Structure):
    """Dl_info of dladdr(3)."""

    _fields_ = (
        ("file_name", ctypes.c_char_p),
        ("file_address", ctypes.c_void_p),
        ("symbol_name", ctypes.c_char_p),
        ("symbol_address", ctypes.c_void_p),
    )


def bound_spinning(environ: MutableMapping[str, str]) -> None:
    """Call it before torch is imported. What an operator has set stays."""
    if "OMP_WAIT_POLICY" not in environ:
        environ.setdefault(SPIN_VARIABLE, str(NUM_SPINS))


def load_openmp() -> str:
    """Makes the runtime's symbols visible to libraries that are loaded later, and returns its file name. Raises OSError."""
    path = _used_by_torch() or _next_to_torch() or "libgomp.so.1"
    ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
    return path


@functools.cache
def _setter() -> Any | None:
    """omp_set_num_threads of the runtime that torch uses."""
    path = _used_by_torch() if sys.platform == "linux" else None
    return None if path is None else ctypes.CDLL(path).omp_set_num_threads


def set_threads_of_this_thread(num_threads: int) -> None:
    """How many threads torch's products and the kernels use when the calling thread calls them. `torch.set_num_threads` would change what
    MKL does for all threads.
    """
    if (set_num_threads := _setter()) is not None:
        set_num_threads(num_threads)


def _used_by_torch() -> str | None:
    """The file in which torch, if this process has loaded it, found its OpenMP runtime."""
    torch = next((path for path in _mapped_files() if path.name == TORCH_LIBRARY), None)
    if torch is None:
        return None
    library = ctypes.CDLL(str(torch), mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
    if not hasattr(library, ENTRY_POINT):
        return None
    info = _SymbolInfo()
    address = ctypes.cast(getattr(library, ENTRY_POINT), ctypes.c_void_p)
    dladdr = ctypes.CDLL(None).dladdr
    dladdr.argtypes = (ctypes.c_void_p, ctypes.POINTER(_SymbolInfo))
    found = dladdr(address, ctypes.byref(info))
    return os.fsdecode(info.file_name) if found and info.file_name else None


def _mapped_files() -> set[Path]:
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {Path(fields[5]) for line in lines if len(fields := line.split(maxsplit=5)) == 6}


def _next_to_torch() -> str | None:
    """The runtime in torch's wheel, before torch is imported: torch then uses the same file."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    package = Path(spec.origin).parent
    places = (package / "lib", package.parent / "torch.libs")
    return next((str(path) for place in places for path in sorted(place.glob("libgomp*.so*"))), None)
