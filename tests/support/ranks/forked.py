"""Processes for ranks that need no environment of their own: forks of one that has imported torch, which takes two seconds of CPU time."""

import multiprocessing
from multiprocessing.context import ForkServerContext


def forking() -> ForkServerContext:
    """The process to fork from starts at the first use, and ends with this one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "workers.engine.build", "workers.rank.worker"])
    return context
