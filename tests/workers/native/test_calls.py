"""Lists of kernel calls: what is recorded, where temporaries lie, and that the list computes what the calls did."""

import ctypes
import itertools
import threading
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.native import native_library

from workers.native.calls import (
    Interruption,
    RecordedCall,
    Temporaries,
    make_program,
    recorded_calls,
    runner_of,
)

START = 1 << 40
COPY = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
RUN = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p]


def temporaries(num: int, num_bytes: int = 64) -> tuple[Temporaries, list[int]]:
    made = Temporaries(START, 1 << 20)
    return made, [made.take(num_bytes) for _ in range(num)]


def test_the_worked_example():
    made, (a, b, c, d) = temporaries(4)
    assert [a, b, c, d] == [START, START + 64, START + 128, START + 192]
    calls = [RecordedCall(1, numbers) for numbers in [(a, 7), (b, a), (a, b, c), (c + 8, d), (d, 9)]]
    program = make_program(calls, made)
    placed = program.placed(1000)["arguments"]
    assert placed[:, :3].tolist() == [
        [1000, 7, 0],
        [1064, 1000, 0],
        [1000, 1064, 1128],
        [1136, 1000, 0],
        [1000, 9, 0],
    ]
    assert program.num_bytes == 192


@given(st.lists(st.tuples(st.integers(1, 300), st.integers(0, 8)), min_size=1, max_size=30))
def test_temporaries_that_live_together_do_not_overlap(kinds):
    """kinds: (bytes, for how many more calls it is read). Each is written by a call of its own."""
    made = Temporaries(START, 1 << 20)
    addresses = [made.take(num_bytes) for num_bytes, _ in kinds]
    calls = [
        RecordedCall(1, (addresses[i], *(addresses[j] for j in range(i) if j + kinds[j][1] >= i)))
        for i in range(len(kinds))
    ]
    placed = make_program(calls, made).placed(0)["arguments"]
    where = {i: int(placed[i][0]) for i in range(len(kinds))}
    for i in range(len(kinds)):
        alive = sorted((where[j], kinds[j][0]) for j in range(i + 1) if j == i or j + kinds[j][1] >= i)
        for (begin, num_bytes), (following, _) in itertools.pairwise(alive):
            assert begin + num_bytes <= following


def test_no_room_is_said():
    assert Temporaries(START, 100).take(101) is None


@pytest.mark.parametrize("name", ["amx", "avx512", "avx2"])
def test_a_list_of_calls_computes_what_they_did(name):
    library = native_library(name)
    copy = library.function("copy_bytes", COPY)
    gather = library.function("gather_rows", [*COPY[:2], ctypes.c_void_p, *[ctypes.c_int64] * 4])
    run = library.function("run_calls", RUN, restype=ctypes.c_int64)
    table, indices = np.arange(40, dtype=np.int64).reshape(10, 4), np.array([7, 0, 7], dtype=np.int64)
    arena, out = np.zeros(1 << 12, dtype=np.uint8), np.zeros((3, 4), dtype=np.int64)
    made = Temporaries(arena.ctypes.data, arena.nbytes)
    first, second = made.take(96), made.take(96)
    with recorded_calls() as calls:
        gather(first, table.ctypes.data, indices.ctypes.data, 3, 32, 0, 10)
        copy(second, first, 96)
        copy(out.ctypes.data, second, 96)
    assert (out == table[indices]).all()
    program = make_program(calls, made)
    memory = np.zeros(program.num_bytes, dtype=np.uint8)
    repeat = runner_of(run, program, start=memory.ctypes.data, keep=(memory,))
    arena[:] = 0xFF
    indices[:] = [9, 1, 2]
    repeat()
    assert (out == table[indices]).all(), "it reads what is in its inputs now"


def test_python_runs_between_the_calls_before_and_after_it():
    copy = native_library("avx2").function("copy_bytes", COPY)
    run = native_library("avx2").function("run_calls", RUN, restype=ctypes.c_int64)
    source, out = np.array([5], dtype=np.int64), np.zeros(1, dtype=np.int64)
    arena = np.zeros(256, dtype=np.uint8)
    made = Temporaries(arena.ctypes.data, arena.nbytes)
    temporary = made.take(8)

    def doubling(address: int) -> Callable[[], None]:
        def double() -> None:
            ctypes.c_int64.from_address(address).value *= 2

        return double

    with recorded_calls() as calls:
        copy(temporary, source.ctypes.data, 8)
        doubling(temporary)()
        calls.append(RecordedCall(0, (temporary,), python=doubling))
        copy(out.ctypes.data, temporary, 8)
    assert out[0] == 10
    program = make_program(calls, made)
    memory = np.zeros(program.num_bytes, dtype=np.uint8)
    repeat = runner_of(run, program, start=memory.ctypes.data, keep=(memory,))
    source[0] = 7
    repeat()
    repeat()
    assert out[0] == 14


@pytest.mark.parametrize("name", ["amx", "avx512", "avx2"])
def test_a_float_among_the_arguments_arrives(name):
    library = native_library(name)
    pointers, size = [ctypes.c_void_p] * 5, ctypes.c_int64
    norm = library.function("add_rms_norm_float32", [*pointers, size, size, ctypes.c_float])
    run = library.function("run_calls", RUN, restype=size)
    x, weight = np.full((1, 4), 2.0, dtype=np.float32), np.ones(4, dtype=np.float32)
    out = np.zeros((1, 4), dtype=np.float32)
    with recorded_calls() as calls:
        norm(out.ctypes.data, x.ctypes.data, x.ctypes.data, None, weight.ctypes.data, 1, 4, 12.0)
    assert out[0, 0] == 0.5  # 2 / sqrt(4 + 12)
    out[:] = 0
    runner_of(run, make_program(calls, Temporaries(START, 64)), start=0, keep=())()
    assert out[0, 0] == 0.5


def test_calls_of_other_threads_are_not_recorded():
    copy = native_library("avx2").function("copy_bytes", COPY)
    source, target = np.ones(8, dtype=np.uint8), np.zeros(8, dtype=np.uint8)
    with recorded_calls() as calls:
        thread = threading.Thread(target=copy, args=(target.ctypes.data, source.ctypes.data, 8))
        thread.start()
        thread.join()
    assert calls == []
    assert target.all()


def test_a_call_that_is_not_done_is_called_again_and_no_other():
    """The second of three calls is not done: it makes the word that says so itself, from a source that the check changes."""
    library = native_library("avx2")
    copy, run = library.function("copy_bytes", COPY), library.function("run_calls", RUN, restype=ctypes.c_int64)
    is_pending, pending = np.array([0], dtype=np.int64), np.array([0], dtype=np.int64)
    source, first, last = (np.array([n], dtype=np.int64) for n in (5, 0, 0))
    with recorded_calls() as calls:
        copy(first.ctypes.data, source.ctypes.data, 8)
        copy(pending.ctypes.data, is_pending.ctypes.data, 8)
        copy(last.ctypes.data, source.ctypes.data, 8)
    seen = []

    def check() -> None:
        seen.append((int(first[0]), int(last[0])))
        source[0] += 1
        is_pending[0] = len(seen) < 3

    program = make_program(calls, Temporaries(START, 64))
    interruption = Interruption(pending.ctypes.data, check)
    repeat = runner_of(run, program, start=0, keep=(), interruption=interruption)
    repeat()
    assert (seen, int(last[0])) == ([], 5)
    is_pending[0], last[0] = 1, 0
    repeat()
    assert seen == [(5, 0)] * 3
    assert int(last[0]) == 8

    def give_up() -> None:
        raise OSError("in vain")

    is_pending[0], last[0] = 1, 0
    repeat = runner_of(run, program, start=0, keep=(), interruption=Interruption(pending.ctypes.data, give_up))
    with pytest.raises(OSError, match="in vain"):
        repeat()
    assert last[0] == 0
