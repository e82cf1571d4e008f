"""The compiled collectives of ranks that share memory, exchange.cpp: kernels of a SharedMemoryGroup. Knows no rounds and no processes."""

import ctypes
from collections.abc import Sequence
from typing import Any

from workers.native.calls import RecordableKernel
from workers.native.library import NativeLibrary, load_library
from workers.native.matrices import DTYPE_NAMES

_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_int64


class NativeExchange:
    """See `workers.parallel.shared_memory.Exchange`."""

    def __init__(self, library: NativeLibrary) -> None:
        def kernel(name: str, argtypes: Sequence[Any]) -> RecordableKernel:
            found = library.function(name, argtypes)
            assert isinstance(found, RecordableKernel), "it returns nothing"
            return found

        self.all_reduce = {
            dtype: kernel(f"all_reduce_{name}", [_POINTER, _POINTER, _SIZE]) for dtype, name in DTYPE_NAMES.items()
        }
        self.gather = kernel("gather_ranks", [*[_POINTER] * 3, _SIZE, _SIZE])
        self.arrive = kernel("arrive", [_POINTER]).unrecorded
        self.await_round = kernel("await_round", [_POINTER, _SIZE]).unrecorded


def native_exchange() -> NativeExchange | None:
    """None where this CPU has no compiled kernels. Raises ConfigError as `load_library`."""
    library = load_library()
    return NativeExchange(library) if isinstance(library, NativeLibrary) else None
