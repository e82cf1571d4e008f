"""A tensor-parallel group that counts its all-reduces and the seconds they take. Wraps any other; knows nothing of what runs on it.

It also knows how long the collective now running has taken: a rank that is slower than the others is waited for at every moment, and is
not stuck while collectives end.
"""

from time import perf_counter

import numpy as np
import torch

from workers.parallel.group import TensorParallel

# A collective that runs this long is suspicious; before, `waiting_for` names no rank.
SLOW_COLLECTIVE_S = 1.0


class TimedGroup:
    """`group.TensorParallel` has the contract. The totals may be read from any thread.

    `all_reduce_s_total` includes the wait for slower ranks. It is None on CUDA, where the host only queues the work.
    """

    def __init__(self, tp: TensorParallel) -> None:
        self.rank = tp.rank
        self.size = tp.size
        self.device = tp.device
        self.num_all_reduces_total = 0
        self.all_reduce_s_total: float | None = None if tp.device.type == "cuda" else 0.0
        self._tp = tp
        self._all_reduce = tp.all_reduce
        self._began = perf_counter()  # the newest collective

    def start_over(self) -> None:
        """Sets the totals to zero: what came before is not part of a step."""
        self.num_all_reduces_total = 0
        if self.all_reduce_s_total is not None:
            self.all_reduce_s_total = 0.0

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        if self.all_reduce_s_total is None:
            self.num_all_reduces_total += 1
            self._began = perf_counter()
            return self._all_reduce(x)
        began = self._began = perf_counter()
        x = self._all_reduce(x)
        self.all_reduce_s_total += perf_counter() - began
        self.num_all_reduces_total += 1
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
        return self._tp.waiting_for() if perf_counter() - self._began >= SLOW_COLLECTIVE_S else ()

    def close(self) -> None:
        self._tp.close()
