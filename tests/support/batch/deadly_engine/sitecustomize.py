"""With this folder on PYTHONPATH, a rank dies of a certain seed as soon as it computes its request: as of a bug in a kernel.

Python imports it at its start; only Ray's workers are touched.
"""

import functools
import os
import signal
import sys

DEADLY_SEED = 66_666


def _kills(schedule):
    @functools.wraps(schedule)
    def deadly(self):
        scheduled = schedule(self)
        if any(each.request.sampling.seed == DEADLY_SEED for each in scheduled):
            os.kill(os.getpid(), signal.SIGKILL)
        return scheduled

    return deadly


if any(argument.endswith("default_worker.py") for argument in sys.orig_argv):
    from workers.engine.scheduling.scheduler import Scheduler

    Scheduler.schedule = _kills(Scheduler.schedule)
