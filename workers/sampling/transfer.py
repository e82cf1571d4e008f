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
    sizes = [-(-array.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES for array in arrays]
    host = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=device.type == "cuda")
    view, begin = host.numpy(), 0
    for array, size in zip(arrays, sizes, strict=True):
        view[begin : begin + array.nbytes].view(array.dtype).reshape(array.shape)[...] = array
        begin += size
    parts = host.to(device, non_blocking=True).split(sizes)
    return [
        part[: array.nbytes].view(_DTYPES[array.dtype.str]).view(array.shape)
        for part, array in zip(parts, arrays, strict=True)
    ]


class Download:
    """Tensors on their way to the host, in one copy. `wait` returns them, on the CPU; the copy begins at once.

    tensors: contiguous, those with the larger elements first, so that each begins at a multiple of its elements' size.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._copied: torch.cuda.Event | None = None
        self._tensors = list(tensors)
        if self._tensors and self._tensors[0].device.type == "cuda":
            parts = [t.view(-1).view(torch.uint8) for t in self._tensors]
            packed = parts[0] if len(parts) == 1 else torch.cat(parts)
            host = torch.empty(packed.shape, dtype=torch.uint8, pin_memory=True).copy_(packed, non_blocking=True)
            sizes = [len(part) for part in parts]
            self._tensors = [
                part.view(t.dtype).view(t.shape) for t, part in zip(tensors, host.split(sizes), strict=True)
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
