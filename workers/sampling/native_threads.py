"""Threads in which llguidance computes without the GIL: their priority, and the CPU time that they use.

Threads inherit the priority of the thread that starts them. So only the native threads get a low one, and the Python thread that waits
for their result keeps its own: with a low priority, it could lose its core while it holds the GIL, and the engine would wait for both.
Knows Linux; elsewhere all threads have the same priority, and elapsed time stands for CPU time.
"""

import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from llguidance import LLExecutor

from workers.thread_priority import TENTH, lower_priority


class NativeThreads:
    """`executor` runs on `num_threads` threads; None: llguidance's default, four fifths of the CPUs. In the background they get about a
    tenth of a core that another thread wants too.
    """

    def __init__(self, num_threads: int | None = None, *, in_background: bool = False) -> None:
        with ThreadPoolExecutor(1, "native-threads-starter") as starter:
            self.executor, self._clocks = starter.submit(_start, num_threads, in_background).result()

    def cpu_time(self) -> float:
        """Seconds that the threads have computed, from an arbitrary zero."""
        if not self._clocks:
            return time.perf_counter()
        cpu_s = 0.0
        for clock in self._clocks:
            with contextlib.suppress(OSError):  # of a thread that was not ours, and has ended
                cpu_s += time.clock_gettime(clock)
        return cpu_s


def _start(num_threads: int | None, in_background: bool) -> tuple[LLExecutor, list[int]]:
    """The executor, and the clocks of its threads; no clocks where they cannot be read. Changes the priority of the calling thread."""
    if in_background:
        lower_priority(TENTH, or_idle=True)
    before = _thread_ids()
    executor = LLExecutor(num_threads)
    others = before | {thread.native_id for thread in threading.enumerate()}
    clocks = [_clock_of(thread_id) for thread_id in _thread_ids() if thread_id not in others]
    try:
        for clock in clocks:
            time.clock_gettime(clock)
    except OSError:
        return executor, []
    return executor, clocks


def _thread_ids() -> set[int]:
    with contextlib.suppress(OSError):
        return {int(task.name) for task in Path("/proc/self/task").iterdir()}
    return set()


def _clock_of(thread_id: int) -> int:
    """The id of a thread's CPU clock: Linux, include/linux/posix-timers.h, CPUCLOCK_PERTHREAD_MASK | CPUCLOCK_SCHED."""
    return (~thread_id << 3) | 4 | 2
