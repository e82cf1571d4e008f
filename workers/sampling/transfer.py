"""Many small arrays to a device in one copy, and results back to the host without a wait before they are needed.

Page-locked memory comes from torch's allocator, which reuses it only after the copy. On the CPU nothing is copied. Knows tensors only.
"""

from collections.abc import Sequence

import numpy as np
import torch

# Each array begins at a multiple of it: enough for every dtype, and for the widest loads of a kernel.
ALIGNMENT_BYTES = 16


def upload(arrays: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """The arrays as tensors on the device, parts of one buffer. Does not wait for the copy; later work of the current stream does."""
    begins, size = [], 0
    for array in arrays:
        begins.append(size)
        size += -(-array.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    host = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    view = host.numpy()
    for begin, array in zip(begins, arrays, strict=True):
        view[begin : begin + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    on_device = host.to(device, non_blocking=True)
    return [
        on_device[begin : begin + array.nbytes].view(_DTYPES[array.dtype.str]).view(array.shape)
        for begin, array in zip(begins, arrays, strict=True)
    ]


class Download:
    """Tensors on their way to the host. `wait` returns them, on the CPU; the copies begin at once."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._copied: torch.cuda.Event | None = None
        self._tensors = list(tensors)
        if self._tensors and self._tensors[0].device.type == "cuda":
            self._tensors = [
                torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True) for t in tensors
            ]
            self._copied = torch.cuda.Event()
            self._copied.record()

    @property
    def is_there(self) -> bool:
        """Whether `wait` returns at once."""
        return self._copied is None or self._copied.query()

    def wait(self) -> list[torch.Tensor]:
        """Waits for the device, unless the copies are there."""
        if self._copied is not None and not self._copied.query():
            self._copied.synchronize()
        self._copied = None
        return self._tensors


_DTYPES = {
    np.dtype(name).str: dtype
    for name, dtype in {
        "uint8": torch.uint8,
        "int32": torch.int32,
        "int64": torch.int64,
        "float32": torch.float32,
    }.items()
}
