"""The compiled kernels for tests: built if they are not current, and a skip with the reason where there can be none."""

import pytest

from workers.device.cpu import read_cpu_flags
from workers.native.amx import AMX_FLAGS, request_tiles
from workers.native.build import BuildError, CompilerFailure, build
from workers.native.library import NativeLibrary, open_library
from workers.native.variants import VARIANTS


def native_library(name: str) -> NativeLibrary:
    """The library of the variant with this name. A compiler that fails is the test's failure."""
    variant = next(variant for variant in VARIANTS if variant.name == name)
    if missing := set(variant.cpu_flags) - read_cpu_flags():
        pytest.skip(f"this CPU lacks {', '.join(sorted(missing))}")
    if AMX_FLAGS & set(variant.cpu_flags) and not request_tiles():
        pytest.skip("this system forbids AMX")
    try:
        build()
    except CompilerFailure:
        raise
    except BuildError as e:
        pytest.skip(str(e))
    library = open_library(variant)
    assert isinstance(library, NativeLibrary), library.reason
    return library
