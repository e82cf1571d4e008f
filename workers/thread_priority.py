"""How a thread gets less of a busy core than the others of its process. Knows Linux; elsewhere nothing changes."""

import contextlib
import os
import sys
import threading

# Two threads share a core by weight, which falls by a fifth with each step of niceness (Linux, sched_prio_to_weight): next to a thread
# of the usual priority, one with 5 steps more gets a quarter of the core, and one with 10 steps more a tenth.
QUARTER = 5
TENTH = 10
_MAX_NICENESS = 19


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
