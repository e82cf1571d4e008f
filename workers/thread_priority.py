"""How a thread gets less of a busy core than the others of its process: by its priority, which Linux knows, and by breaks."""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable

# Two threads share a core by weight, which falls by a fifth with each step of niceness (Linux, sched_prio_to_weight): next to a thread
# of the usual priority, one with 5 steps more gets a quarter of the core, and one with 10 steps more a tenth.
QUARTER = 5
TENTH = 10
_MAX_NICENESS = 19
# Work between two breaks. Another thread that wants Python's lock waits as long at most, and then gets it.
PIECE_S = 0.0005
MAX_BREAK_S = 0.05


def lower_priority(steps: int, *, or_idle: bool = False) -> None:
    """Adds to the niceness of the calling thread, and of those that it starts. There is no way back.

    The maximum is 19, and Ray starts its workers with 15. With `or_idle`, a thread that would exceed it becomes an idle thread
    (SCHED_IDLE), whose weight is a twelfth of that of niceness 15.
    """
    if sys.platform != "linux":
        return
    with contextlib.suppress(OSError):
        thread_id = threading.get_native_id()
        niceness = os.getpriority(os.PRIO_PROCESS, thread_id) + steps
        os.setpriority(os.PRIO_PROCESS, thread_id, min(_MAX_NICENESS, niceness))
        if or_idle and niceness > _MAX_NICENESS:
            os.sched_setscheduler(thread_id, os.SCHED_IDLE, os.sched_param(0))


class Breaks:
    """Call it often: it sleeps so long that the calling thread works for at most `share` of the time.

    For work beside threads that wait for each other at every turn. A low priority is not enough there: a thread that has to wait for a
    core, or for Python's lock, keeps all of them waiting. By the clock: work that is slow, because others want its core, makes breaks
    longer.
    """

    def __init__(
        self,
        share: float,
        *,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._rest = 1 / share - 1
        self._clock = clock
        self._sleep = sleep
        self._began = clock()

    def __call__(self) -> None:
        worked_s = self._clock() - self._began
        if worked_s >= PIECE_S:
            self._sleep(min(worked_s * self._rest, MAX_BREAK_S))
            self._began = self._clock()


def no_break() -> None:
    """For work beside which nothing else runs."""
