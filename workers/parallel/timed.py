"""A tensor-parallel group that counts its all-reduces and the seconds they take. Wraps any other; knows nothing of what runs on it.

It also knows how long the collective now running has taken: a rank that is slower than the others is waited for at every moment, and is
not stuck while collectives end.
"""

import time
from time import perf_counter

import numpy as np
import torch

from workers.parallel.group import TensorParallel
from workers.parallel.shared_memory import SharedMemoryGroup

# A collective that runs this long is suspicious; before, `waiting_for` names no rank.
SLOW_COLLECTIVE_S = 1.0


class TimedGroup:
    """`group.TensorParallel` has the contract. The totals may be read from any thread.

    `all_reduce_s_total` includes the wait for slower ranks. It is None on CUDA, where the host only queues the work. A SharedMemoryGroup
    counts by itself, because lists of compiled calls run its all-reduces past this class.
    """

    def __init__(self, tp: TensorParallel) -> None:
        self.rank = tp.rank
        self.size = tp.size
        self.device = tp.device
        self.shared_memory = tp if isinstance(tp, SharedMemoryGroup) else None
        self._tp = tp
        self._all_reduce = tp.all_reduce
        self._has_seconds = tp.device.type != "cuda"
        self._num, self._seconds = 0, 0.0
        self._before = (0, 0.0)  # of the totals, what `start_over` has left out
        self._began = perf_counter()  # the newest collective

    @property
    def num_all_reduces_total(self) -> int:
        return self._totals()[0] - self._before[0]

    @property
    def all_reduce_s_total(self) -> float | None:
        return self._totals()[1] - self._before[1] if self._has_seconds else None

    def start_over(self) -> None:
        """Sets the totals to zero: what came before is not part of a step."""
        self._before = self._totals()

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        began = self._began = perf_counter()
        x = self._all_reduce(x)
        self._seconds += perf_counter() - began
        self._num += 1
        return x

    def gather(self, x: torch.Tensor) -> torch.Tensor | None:
        self._began = perf_counter()
        return self._tp.gather(x)

    def broadcast(self, message: np.ndarray | None) -> np.ndarray:
        self._began = perf_counter()
        return self._tp.broadcast(message)

    def broadcast_tensor(self, x: torch.Tensor) -> torch.Tensor:
        self._began = perf_counter()
        return self._tp.broadcast_tensor(x)

    def min(self, value: int) -> int:
        self._began = perf_counter()
        return self._tp.min(value)

    def waiting_for(self) -> tuple[int, ...]:
        """Empty until the running collective has taken SLOW_COLLECTIVE_S."""
        age_s = perf_counter() - self._began
        if self.shared_memory is not None:
            age_s = min(age_s, (time.monotonic_ns() - self.shared_memory.state.began_ns) / 1e9)
        return self._tp.waiting_for() if age_s >= SLOW_COLLECTIVE_S else ()

    def close(self) -> None:
        self._tp.close()

    def _totals(self) -> tuple[int, float]:
        if self.shared_memory is None:
            return self._num, self._seconds
        return self.shared_memory.state.num_all_reduces, self.shared_memory.state.all_reduces_ns / 1e9
