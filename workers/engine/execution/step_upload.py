"""Puts the arrays of one step on the device in a single copy. Knows no batch and no model.

The arrays lie one after the other at the beginning of a buffer that never moves, so steps with the same shapes find each array at the same
address: a CUDA graph reads its inputs there.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch

# Of every array: what the widest loads of a GPU need. Triton compiles another kernel for addresses that are not multiples of 16.
ALIGNMENT = 64
# Host buffers, in turn. The copy from one may still wait on the device while the next step fills the other.
NUM_HOST_BUFFERS = 2


class StepUpload:
    """Holds `capacity` bytes on the device."""

    def __init__(self, capacity: int, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._device_buffer = torch.zeros(capacity, dtype=torch.uint8, device=device)
        self._host_buffers = [
            torch.zeros(capacity, dtype=torch.uint8, pin_memory=self._on_cuda) for _ in range(NUM_HOST_BUFFERS)
        ]
        self._copied = [torch.cuda.Event() if self._on_cuda else None for _ in range(NUM_HOST_BUFFERS)]
        self._turn = 0
        self._layout = _Layout((), self._device_buffer, self._host_buffers)

    def upload(self, arrays: Sequence[tuple[np.ndarray, torch.dtype]]) -> list[torch.Tensor]:
        """Each array in its type on the device, int32 or int64, in its shape. Valid until the next call."""
        self._turn = (self._turn + 1) % NUM_HOST_BUFFERS
        copied = self._copied[self._turn]
        if copied is not None and not copied.query():
            copied.synchronize()
        shapes = tuple((values.shape, dtype) for values, dtype in arrays)
        if shapes != self._layout.shapes:
            self._layout = _Layout(shapes, self._device_buffer, self._host_buffers)
        layout = self._layout
        for (values, _), target in zip(arrays, layout.on_host[self._turn], strict=True):
            target[...] = values
        host = self._host_buffers[self._turn]
        self._device_buffer[: layout.num_bytes].copy_(host[: layout.num_bytes], non_blocking=True)
        if copied is not None:
            copied.record()
        return layout.on_device


class _Layout:
    """Where arrays of some shapes lie, in all buffers. Most steps have the shapes of the step before."""

    def __init__(
        self,
        shapes: tuple[tuple[tuple[int, ...], torch.dtype], ...],
        device_buffer: torch.Tensor,
        host_buffers: Sequence[torch.Tensor],
    ) -> None:
        self.shapes = shapes
        self.on_device: list[torch.Tensor] = []
        self.on_host: list[list[np.ndarray]] = [[] for _ in host_buffers]
        self.num_bytes = 0
        for shape, dtype in shapes:
            start = math.ceil(self.num_bytes / ALIGNMENT) * ALIGNMENT
            self.num_bytes = start + math.prod(shape) * dtype.itemsize
            self.on_device.append(device_buffer[start : self.num_bytes].view(dtype).view(shape))
            for host, targets in zip(host_buffers, self.on_host, strict=True):
                targets.append(host[start : self.num_bytes].view(dtype).view(shape).numpy())


def bytes_for(*sizes: int) -> int:
    """The capacity for arrays of as many int64 elements each."""
    return sum(8 * size + ALIGNMENT for size in sizes)
