"""A thread that lowers its priority gets less of a busy core, and so do those that it starts; other threads keep theirs."""

import os
import sys
import threading
from collections.abc import Callable

import pytest

from workers.thread_priority import MAX_BREAK_S, PIECE_S, QUARTER, TENTH, Breaks, lower_priority

ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="threads have priorities of their own on Linux")


def in_thread(*steps: Callable[[], None]) -> tuple[int, int]:
    """Niceness and policy of a thread that has called `steps`."""
    found = []

    def run() -> None:
        for step in steps:
            step()
        thread_id = threading.get_native_id()
        found.append((os.getpriority(os.PRIO_PROCESS, thread_id), os.sched_getscheduler(thread_id)))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0]


@ON_LINUX
def test_only_the_calling_thread_is_changed() -> None:
    before = in_thread()
    assert in_thread(lambda: lower_priority(QUARTER))[0] == min(19, before[0] + QUARTER)
    assert in_thread() == before


@ON_LINUX
def test_beyond_the_maximum_a_thread_may_become_idle() -> None:
    """Ray starts its workers with niceness 15."""

    def start_as_ray_does() -> None:
        lower_priority(max(0, 15 - os.getpriority(os.PRIO_PROCESS, threading.get_native_id())))

    assert in_thread(start_as_ray_does, lambda: lower_priority(QUARTER)) == (19, os.SCHED_OTHER)
    assert in_thread(start_as_ray_does, lambda: lower_priority(TENTH, or_idle=True)) == (19, os.SCHED_IDLE)


def test_breaks_leave_three_quarters_of_the_time_to_others():
    now, slept = [0.0], []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds

    take_break = Breaks(0.25, clock=lambda: now[0], sleep=sleep)
    for worked_s in (PIECE_S / 2, PIECE_S / 2 + 1e-9, 0.002, 1.0):
        now[0] += worked_s
        take_break()
    assert slept == pytest.approx([3 * PIECE_S, 0.006, MAX_BREAK_S], rel=1e-3), "little work takes no break of its own"
