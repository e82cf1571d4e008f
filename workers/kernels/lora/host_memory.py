"""Where an adapter lies on the host: its many small matrices in few large pieces, in large pages where the system has them.

A step reads each of them once, and in pages of 4 KiB of their own the processor would stop reading ahead at each page's end: with 8
adapters at 8 rows, 1.0 ms a layer and not 0.7.
"""

import math

import torch

from workers.native.huge_pages import prefer_huge_pages

PIECE_BYTES = 16 << 20
ALIGNMENT = 64


class HostMemory:
    """One adapter's. Pieces live as long as a tensor in them."""

    def __init__(self) -> None:
        self._piece = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def keep(self, values: torch.Tensor) -> torch.Tensor:
        """A contiguous copy."""
        num_bytes = values.numel() * values.element_size()
        if self._used + num_bytes > len(self._piece):
            self._piece = torch.empty(max(PIECE_BYTES, num_bytes), dtype=torch.uint8)
            prefer_huge_pages(self._piece)
            self._used = 0
        kept = self._piece[self._used : self._used + num_bytes].view(values.dtype).view(values.shape)
        self._used += math.ceil(num_bytes / ALIGNMENT) * ALIGNMENT
        return kept.copy_(values)
