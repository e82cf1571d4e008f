"""Where an adapter lies on the host: its many small matrices in few large pieces, in large pages where the system has them.

A step reads each of them once, and in pages of 4 KiB of their own the processor would stop reading ahead at each page's end: with 8
adapters at 8 rows, 1.0 ms a layer and not 0.7.
"""

import math
from collections.abc import Callable, Sequence

import torch

from workers.native.huge_pages import prefer_huge_pages
from workers.thread_priority import no_break

PIECE_BYTES = 16 << 20
ALIGNMENT = 64


class HostMemory:
    """One adapter's. Pieces live as long as a tensor in them. take_break: called before each tensor that is made."""

    def __init__(self, take_break: Callable[[], None] = no_break) -> None:
        self._take_break = take_break
        self._piece = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def new(self, shape: Sequence[int], dtype: torch.dtype, *, pins: bool = False) -> torch.Tensor:
        """Contiguous, with undefined values. pins: a GPU copies from it; the same in all calls."""
        self._take_break()
        num_bytes = math.prod(shape) * dtype.itemsize
        if self._used + num_bytes > len(self._piece):
            self._piece = torch.empty(max(PIECE_BYTES, num_bytes), dtype=torch.uint8, pin_memory=pins)
            if not pins:
                prefer_huge_pages(self._piece)
            self._used = 0
        found = self._piece[self._used : self._used + num_bytes].view(dtype).view(*shape)
        self._used += math.ceil(num_bytes / ALIGNMENT) * ALIGNMENT
        return found
