"""The tensor-parallel group: everything the model and the engine need from the other ranks.

`TensorParallel` is the seam. Implementations: `SingleRank` here (one process, no process group), `SharedMemoryGroup`
(CPU ranks of one host), `DistributedGroup` (NCCL on CUDA, Gloo for CPU ranks on different hosts).
Knows no model and no Ray.
"""

from collections.abc import Sequence
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

    def broadcast_tensor(self, x: torch.Tensor) -> torch.Tensor:
        """Rank 0's `x` on all ranks, in place. x: any shape, contiguous, on `device`; the same shape and type on all ranks.

        Part of a step, unlike `broadcast`: no rank waits longer than for an all-reduce.
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


def sum_in_rank_order(parts: Sequence[torch.Tensor], *, out: torch.Tensor) -> None:
    """The sum of all ranks' parts into `out`, first to last, so that each element's bits depend on nothing but its parts.

    Half types are summed in fp32 and rounded once. Parts and out: the same shape and dtype; out is none of the parts.
    """
    is_half = out.dtype in (torch.bfloat16, torch.float16)
    total = parts[0].float() if is_half else out.copy_(parts[0])
    for part in parts[1:]:
        total.add_(part)
    if is_half:
        out.copy_(total)


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

    def broadcast_tensor(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def min(self, value: int) -> int:
        return value

    def waiting_for(self) -> tuple[int, ...]:
        return ()

    def close(self) -> None:
        pass
