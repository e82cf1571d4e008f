"""Stored values as a dense matrix, for a device that has no product of their form. Knows no layers and no files."""

import torch
from torch import nn

from workers.quant.method import WeightMethod
from workers.quant.quantized import StoredValues, dense_values
from workers.quant.stored import Matrix, Pack


def pack_as_dense(method: WeightMethod) -> Pack:
    """method: a dense one, which computes."""

    class Dense(nn.Module):
        weight: nn.Parameter
        is_dense = True

        def __init__(self, weight: torch.Tensor) -> None:
            super().__init__()
            self.weight = nn.Parameter(weight, requires_grad=False)
            method.finish(self)

        @property
        def tensors(self) -> tuple[torch.Tensor, ...]:
            return (self.weight,)

        def multiply(self, x: torch.Tensor) -> torch.Tensor:
            return method.apply(self, x)

    def pack(values: StoredValues, dtype: torch.dtype, device: torch.device) -> Matrix:
        return Dense(dense_values(values).to(device=device, dtype=dtype))

    return pack
