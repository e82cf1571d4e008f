"""The tensor-parallel group: everything the model and the engine need from the other ranks.

`TensorParallel` is the seam. Implementations: `SingleRank` here (one process, no process group), `SharedMemoryGroup`
(CPU ranks of one host), `DistributedGroup` (NCCL on CUDA, Gloo for CPU ranks on different hosts).
Knows no model and no Ray.
"""

from typing import Protocol

import numpy as np
import torch


class TensorParallel(Protocol):
    """Collectives over the ranks of one replica. Every rank calls the same methods in the same order.

    All methods raise GroupError, naming the missing ranks where they are known, instead of waiting forever.
    """

    rank: int
    size: int
    device: torch.device

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over ranks; may overwrite and return `x`. x: any shape, contiguous, on `device`."""
        ...

    def gather(self, x: torch.Tensor) -> torch.Tensor | None:
        """Concatenate along the last dimension on rank 0, in rank order; None elsewhere. Shapes are equal on all ranks."""
        ...

    def broadcast(self, message: np.ndarray | None) -> np.ndarray:
        """Rank 0 passes a 1-D int32 array, the others None; all return it. On the host, never on the device.

        A rank may wait here for as long as rank 0 has nothing to say.
        """
        ...

    def min(self, value: int) -> int:
        """The smallest value over ranks."""
        ...

    def waiting_for(self) -> tuple[int, ...]:
        """Ranks that the collective now running on this rank still waits for. Safe to call from another thread."""
        ...

    def close(self) -> None:
        """Releases shared memory and process groups. Idempotent."""
        ...


def rank_device(device: torch.device | str) -> torch.device:
    """A rank's own device: Ray shows each actor one GPU, so on CUDA it is the first; collectives need the index."""
    device = torch.device(device)
    return torch.device("cuda", 0) if device == torch.device("cuda") else device


class SingleRank:
    """A group of one: every collective is the identity."""

    rank = 0
    size = 1

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = rank_device(device)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def gather(self, x: torch.Tensor) -> torch.Tensor | None:
        return x

    def broadcast(self, message: np.ndarray | None) -> np.ndarray:
        assert message is not None, "rank 0 must bring the message"
        return message

    def min(self, value: int) -> int:
        return value

    def waiting_for(self) -> tuple[int, ...]:
        return ()

    def close(self) -> None:
        pass
