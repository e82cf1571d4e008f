"""Tensor parallelism with one thread a rank, all on one device: shows that shards add up where there is a single GPU.

See `TensorParallel`. All threads launch on one stream, in the order that the barriers give, so no rank reads what is not computed yet.
"""

import threading
from dataclasses import dataclass, field

import numpy as np
import torch

from workers.parallel.group import sum_in_rank_order

PATIENCE_S = 60.0


@dataclass
class Shared:
    """What the ranks of one group exchange."""

    size: int
    barrier: threading.Barrier = field(init=False)
    tensors: list[torch.Tensor | None] = field(init=False)
    message: np.ndarray | None = None
    values: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.size, timeout=PATIENCE_S)
        self.tensors = [None] * self.size
        self.values = [0] * self.size


class ThreadGroup:
    """One rank of it."""

    def __init__(self, shared: Shared, rank: int, device: torch.device) -> None:
        self.rank, self.size, self.device = rank, shared.size, device
        self._shared = shared

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        parts = self._exchange(x)
        total = torch.empty_like(x)
        sum_in_rank_order(parts, out=total)
        self._shared.barrier.wait()  # nobody overwrites its part before all have added it
        return total

    def gather(self, x: torch.Tensor) -> torch.Tensor | None:
        joined = torch.cat(self._exchange(x), dim=-1)
        self._shared.barrier.wait()
        return joined if self.rank == 0 else None

    def broadcast(self, message: np.ndarray | None) -> np.ndarray:
        if self.rank == 0:
            self._shared.message = message
        self._shared.barrier.wait()
        received = self._shared.message
        self._shared.barrier.wait()
        assert received is not None, "rank 0 passes the message"
        return received

    def broadcast_tensor(self, x: torch.Tensor) -> torch.Tensor:
        first = self._exchange(x)[0]
        if self.rank:
            x.copy_(first)
        self._shared.barrier.wait()
        return x

    def min(self, value: int) -> int:
        self._shared.values[self.rank] = value
        self._shared.barrier.wait()
        least = min(self._shared.values)
        self._shared.barrier.wait()
        return least

    def waiting_for(self) -> tuple[int, ...]:
        return ()

    def close(self) -> None:
        self._shared.barrier.abort()

    def _exchange(self, x: torch.Tensor) -> list[torch.Tensor]:
        self._shared.tensors[self.rank] = x
        self._shared.barrier.wait()
        return [part for part in self._shared.tensors if part is not None]
