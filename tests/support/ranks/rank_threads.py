"""Ranks of a tensor-parallel group as threads of the test's process: real collectives without the cost of starting processes."""

import itertools
import os
import threading
from collections.abc import Callable
from typing import Any

from workers.native.exchange import native_exchange
from workers.parallel.group import SingleRank, TensorParallel
from workers.parallel.shared_memory import SharedMemoryGroup

_numbers = itertools.count()


def unique_name() -> str:
    """A group name no other test uses."""
    return f"test-{os.getpid()}-{next(_numbers)}"


def run_ranks(size: int, program: Callable[[TensorParallel], Any], **options: Any) -> list[Any]:
    """Runs `program(tp)` on every rank; returns what each returned, or raises the first rank's exception that is one.

    `options` are SharedMemoryGroup's. Its exchange is compiled where it can be, as in serving.
    """
    name = unique_name()
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            options_ = {"timeout_s": 20.0, "join_timeout_s": 20.0, "exchange": native_exchange(), **options}
            tp = SingleRank() if size == 1 else SharedMemoryGroup(name, rank=rank, size=size, **options_)
            try:
                results[rank] = program(tp)
            finally:
                tp.close()
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=run, args=(rank,), name=f"rank-{rank}") for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results
