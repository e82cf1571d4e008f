"""What a SharedMemoryGroup and compiled collectives share: the kernels that it calls, and what one rank knows of its own rounds, in memory
that they read and change. exchange.cpp has the same layout. Knows no other rank and runs nothing.
"""

import ctypes
from collections.abc import Callable, Mapping
from typing import Protocol

import torch

EVERY_OTHER = -1  # as an awaited rank
_FIELDS = (
    "words",  # the address of the shared memory
    "rank",
    "size",
    "capacity_bytes",
    "round",
    "awaited",
    "awaited_rank",
    "waits_since_ns",
    "pending",
    "is_closed",
    "is_written",
    "done_bytes",
    "num_all_reduces",
    "all_reduces_ns",
    "began_ns",
)


class GroupState(ctypes.Structure):
    """`round`: as in shared memory. `awaited`: while this rank waits, the round that `awaited_rank` must have reached, since
    `waits_since_ns`; otherwise 0. `pending`: a compiled collective returned before it was done, and wants to be called again. `is_written`
    and `done_bytes`: how far it is. `began_ns`: the newest collective. Times are those of time.monotonic_ns().
    """

    words: int
    rank: int
    size: int
    capacity_bytes: int
    round: int
    awaited: int
    awaited_rank: int
    waits_since_ns: int
    pending: int
    is_closed: int
    is_written: int
    done_bytes: int
    num_all_reduces: int
    all_reduces_ns: int
    began_ns: int

    _fields_ = tuple((name, ctypes.c_int64) for name in _FIELDS)

    @property
    def address(self) -> int:
        return ctypes.addressof(self)

    @property
    def pending_address(self) -> int:
        return self.address + _FIELDS.index("pending") * ctypes.sizeof(ctypes.c_int64)


class Kernel(Protocol):
    """Takes the address of a GroupState first. Where `pending` is set afterwards, it wants to be called again, past any recording."""

    @property
    def unrecorded(self) -> Callable[..., object]: ...
    def __call__(self, *arguments: int) -> None: ...


class Exchange(Protocol):
    """Compiled kernels. all_reduce: (tensor, number of values), by dtype. gather: (all of rank 0 or 0, tensor, rows, bytes of a row).
    arrive: this rank has reached its round. await_round: waits for (rank or EVERY_OTHER) to reach it.
    """

    @property
    def all_reduce(self) -> Mapping[torch.dtype, Kernel]: ...
    @property
    def gather(self) -> Kernel: ...
    @property
    def arrive(self) -> Callable[[int], object]: ...
    @property
    def await_round(self) -> Callable[[int, int], object]: ...
