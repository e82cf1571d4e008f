"""Loads the compiled kernels, or says why there are none. Knows which variant this CPU can run; knows no kernel and imports no torch."""

import ctypes
import functools
import os
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from workers.device.cpu import read_cpu_flags
from workers.errors import ConfigError
from workers.native.amx import AMX_FLAGS, request_tiles
from workers.native.calls import RecordableKernel
from workers.native.openmp import load_openmp
from workers.native.variants import FOLDER, VARIANTS, Variant, build_id, is_current

ISA_VARIABLE = "TRAMONTANE_CPU_ISA"
NONE = "none"
BUILD_IT = "Run `python -m workers.native.build`, which needs g++."


@dataclass(frozen=True, kw_only=True)
class NativeLibrary:
    """The kernels of one variant.

    build_id: 16 hex digits; libraries with the same id and variant were built from the same sources with the same flags.
    openmp: the file of the OpenMP runtime that the kernels share with torch.
    """

    variant: str
    build_id: str
    openmp: str
    _symbols: ctypes.CDLL = field(repr=False)

    def function(self, name: str, argtypes: Sequence[Any], *, restype: Any = None) -> Callable[..., Any]:
        """The C function `tramontane_VARIANT_NAME`, with ctypes' types of its arguments and result. AttributeError: there is none."""
        found = self._symbols[f"tramontane_{self.variant}_{name}"]
        found.argtypes, found.restype = argtypes, restype
        return found if restype is not None else RecordableKernel(found)


@dataclass(frozen=True, kw_only=True)
class NoNativeLibrary:
    """`reason`: one or two sentences."""

    reason: str


@functools.cache
def load_library() -> NativeLibrary | NoNativeLibrary:
    """The best variant that this CPU can run and TRAMONTANE_CPU_ISA allows; once per process. ConfigError: the variable is wrong."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return NoNativeLibrary(reason=f"The kernels are for Linux on x86-64, not for {platform.machine()}.")
    flags = read_cpu_flags()
    if not request_tiles():
        flags -= AMX_FLAGS
    variant = choose_variant(flags, limit=os.environ.get(ISA_VARIABLE))
    return variant if isinstance(variant, NoNativeLibrary) else open_library(variant)


def choose_variant(cpu_flags: frozenset[str], *, limit: str | None) -> Variant | NoNativeLibrary:
    """`limit`: the best variant to use, or "none"; None or "" for no limit."""
    names = [variant.name for variant in VARIANTS]
    if limit and limit not in (*names, NONE):
        raise ConfigError(
            f"{ISA_VARIABLE}={limit} names no instruction set.",
            remedy=f"Use one of {', '.join((*names, NONE))}, or unset it.",
            param=ISA_VARIABLE,
        )
    if limit == NONE:
        return NoNativeLibrary(reason=f"{ISA_VARIABLE}={NONE} turns them off.")
    allowed = VARIANTS[names.index(limit) if limit else 0 :]
    for variant in allowed:
        if cpu_flags.issuperset(variant.cpu_flags):
            return variant
    missing = ", ".join(flag for flag in allowed[-1].cpu_flags if flag not in cpu_flags)
    return NoNativeLibrary(reason=f"This CPU lacks the instructions {missing}.")


def open_library(variant: Variant, folder: Path = FOLDER) -> NativeLibrary | NoNativeLibrary:
    """The library of a variant in a folder, if it is there, current, and can be loaded."""
    path = variant.library_path(folder)
    if not path.exists():
        return NoNativeLibrary(reason=f"They are not built. {BUILD_IT}")
    if not is_current(variant, folder):
        return NoNativeLibrary(reason=f"{path.name} was built from other sources than those next to it. {BUILD_IT}")
    try:
        openmp = load_openmp()
        symbols = ctypes.CDLL(str(path))
    except OSError as e:
        return NoNativeLibrary(reason=f"{path.name} cannot be loaded: {e}.")
    return NativeLibrary(variant=variant.name, build_id=build_id(variant, folder), openmp=openmp, _symbols=symbols)
