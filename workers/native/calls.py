"""Lists of kernel calls that repeat as one call (calls.cpp): how calls are recorded, where their memory lies, and how they run again.

Knows addresses and numbers; no tensors' meaning and no model. Python takes some 10 us for a call with its tensors, as long as a kernel
needs for a row of a small model.

While calls are recorded, each temporary gets addresses of its own. A temporary lives from the first call that names an address in it to
the last; afterwards others take its place. Of four temporaries of 64 bytes:

    lives in calls    0-2   1-2   2-3   3-4
    recorded at         0    64   128   192
    repeated at         0    64   128     0
"""

import bisect
import contextlib
import ctypes
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np

MAX_ARGUMENTS = 18
ALIGNMENT = 64
_CALL = np.dtype([("kernel", "u8"), ("arguments", "i8", MAX_ARGUMENTS), ("real", "f4"), ("padding", "i4")])


@dataclass(frozen=True, slots=True)
class RecordedCall:
    """python: makes, of the addresses that its `arguments` then have, what runs between kernels."""

    kernel: int
    arguments: tuple[int, ...]
    real: float = 0.0
    python: Callable[..., Callable[[], None]] | None = None


class _Recording(threading.local):
    """Of the calling thread: other engines in the process go on."""

    calls: list[RecordedCall] | None = None


_recording = _Recording()


class RecordableKernel:
    """A kernel that can be called, and whose calls can be recorded."""

    __slots__ = ("_address", "_function", "_real_at")

    def __init__(self, function: Any) -> None:
        self._function = function
        self._address = cast(int, ctypes.cast(function, ctypes.c_void_p).value)
        reals = [i for i, kind in enumerate(function.argtypes) if kind is ctypes.c_float]
        assert len(reals) <= 1 and len(function.argtypes) - len(reals) <= MAX_ARGUMENTS
        self._real_at = reals[0] if reals else None

    @property
    def unrecorded(self) -> Callable[..., Any]:
        """The same, for calls that are never part of a list."""
        return cast(Callable[..., Any], self._function)

    def __call__(self, *arguments: Any) -> None:
        if _recording.calls is not None:
            at = self._real_at
            real = 0.0 if at is None else arguments[at]
            numbers = tuple(argument or 0 for i, argument in enumerate(arguments) if i != at)
            _recording.calls.append(RecordedCall(self._address, numbers, real))
        self._function(*arguments)


@contextlib.contextmanager
def recorded_calls() -> Iterator[list[RecordedCall]]:
    """The calls that this thread makes until the end of the block."""
    assert _recording.calls is None, "calls are being recorded already"
    calls: list[RecordedCall] = []
    _recording.calls = calls
    try:
        yield calls
    finally:
        _recording.calls = None


@dataclass(slots=True)
class Temporaries:
    """Addresses for what a step writes and reads again: `size` bytes from `start` on, given out one after the other."""

    start: int
    size: int
    begins: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)

    def take(self, num_bytes: int) -> int | None:
        """An address; None if no room is left."""
        begin = self.ends[-1] if self.ends else self.start
        end = begin + -(-max(1, num_bytes) // ALIGNMENT) * ALIGNMENT
        if end > self.start + self.size:
            return None
        self.begins.append(begin)
        self.ends.append(end)
        return begin

    def at(self, address: int) -> int | None:
        """Which of them holds this address."""
        i = bisect.bisect_right(self.begins, address) - 1
        return i if i >= 0 and address < self.ends[i] else None


@dataclass(frozen=True, slots=True)
class Program:
    """Calls whose temporaries lie from address 0 on, `num_bytes` in all. relative: (call, argument) of the addresses in them."""

    calls: "np.ndarray[Any, Any]"
    relative: tuple["np.ndarray[Any, Any]", "np.ndarray[Any, Any]"]
    num_bytes: int
    python: dict[int, RecordedCall] = field(default_factory=dict)  # by the place in calls

    def placed(self, start: int) -> "np.ndarray[Any, Any]":
        """The calls with temporaries from `start` on."""
        calls = self.calls.copy()
        calls["arguments"][self.relative] += start
        return calls


def make_program(calls: Sequence[RecordedCall], temporaries: Temporaries) -> Program:
    """Gives temporaries that do not live at the same time the same memory."""
    packed = np.zeros(len(calls), dtype=_CALL)
    lives: dict[int, list[int]] = {}
    places: list[tuple[int, int, int]] = []
    for i, call in enumerate(calls):
        packed[i]["kernel"], packed[i]["real"] = call.kernel, call.real
        packed[i]["arguments"][: len(call.arguments)] = call.arguments
        for j, argument in enumerate(call.arguments):
            which = temporaries.at(argument)
            if which is not None:
                lives.setdefault(which, [i, i])[1] = i
                places.append((i, j, which))
    sizes = {which: temporaries.ends[which] - temporaries.begins[which] for which in lives}
    offsets, num_bytes = _lay_out(lives, sizes)
    for i, j, which in places:
        packed[i]["arguments"][j] += offsets[which] - temporaries.begins[which]
    at = np.array([place[:2] for place in places], dtype=np.int64).reshape(-1, 2)
    python = {i: call for i, call in enumerate(calls) if call.python is not None}
    return Program(packed, (at[:, 0], at[:, 1]), num_bytes, python)


def _lay_out(lives: dict[int, list[int]], sizes: dict[int, int]) -> tuple[dict[int, int], int]:
    """Where each temporary begins, and how much memory they need together. First fit in the order of their first calls."""
    offsets: dict[int, int] = {}
    alive: list[int] = []
    num_bytes = 0
    for which in sorted(lives, key=lambda w: lives[w][0]):
        first = lives[which][0]
        alive = sorted((w for w in alive if lives[w][1] >= first), key=offsets.__getitem__)
        offset = 0
        for other in alive:
            if offset + sizes[which] <= offsets[other]:
                break
            offset = max(offset, offsets[other] + sizes[other])
        offsets[which] = offset
        alive.append(which)
        num_bytes = max(num_bytes, offset + sizes[which])
    return offsets, num_bytes


@dataclass(frozen=True, slots=True)
class Interruption:
    """Calls that wait for others return from time to time before they are done. address: of a word that is not 0 then. check: raises what
    makes it useless to go on.
    """

    address: int
    check: Callable[[], None]


def runner_of(
    function: Callable[..., Any],
    program: Program,
    *,
    start: int,
    keep: Sequence[object],
    interruption: Interruption | None = None,
) -> Callable[[], None]:
    """What repeats the calls, with temporaries from `start` on. function: run_calls of the library. keep: what owns the memory.
    interruption: None if every call is done when it returns.
    """
    calls = program.placed(start)
    size, first = calls.dtype.itemsize, calls.ctypes.data
    pending = None if interruption is None else interruption.address

    def run_some(begin: int, end: int) -> None:
        while (begin := begin + function(first + begin * size, end - begin, pending)) < end:
            assert interruption is not None, "only then is a call not done"
            interruption.check()

    parts: list[tuple[Callable[..., None], tuple[int, ...]]] = []
    begin = 0
    for at in (*sorted(program.python), len(calls)):
        if begin < at:
            parts.append((run_some, (begin, at)))
        begin = at + 1
        if (call := program.python.get(at)) is not None and call.python is not None:
            addresses = calls[at]["arguments"][: len(call.arguments)].tolist()
            parts.append((call.python(*addresses), ()))

    def run(_kept: Sequence[object] = (calls, *keep)) -> None:
        for part, arguments in parts:
            part(*arguments)

    return run
