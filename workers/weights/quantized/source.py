"""What a reader of a quantised matrix needs of each of its tensors. Knows no format and no file."""

from typing import Protocol

import torch

from workers.quant.method import Index


class StoredTensor(Protocol):
    """A tensor in a file, read only where it is indexed. dtype: as safetensors name it, "I32"."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    def __getitem__(self, index: Index) -> torch.Tensor: ...
