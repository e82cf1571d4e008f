"""Frozen matrices in 8 or 4 bits through which gradients pass: for training an adapter beside the very weights that will serve it.

For examples/finetune. Knows modules of torch and how `--quantization` rounds; nothing of serving.
"""

from typing import Any, Literal

import torch
from torch import nn

from workers.quant.at_load import round_to_groups


class _Product(torch.autograd.Function):
    """x @ weight.T, where backward makes the plain numbers of the weight again instead of keeping them."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: "QuantizedLinear") -> torch.Tensor:
        ctx.layer = layer
        return nn.functional.linear(x, layer.weight.to(x.dtype), layer.bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return grad @ ctx.layer.weight.to(grad.dtype), None


class QuantizedLinear(nn.Linear):
    """A frozen matrix in the form of `tramontane serve --quantization`: whole numbers of 8 or 4 bits, with a scale for each 32 of them."""

    values: torch.Tensor
    scales: torch.Tensor

    def __init__(self, linear: nn.Linear, num_bits: Literal[4, 8]) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.num_bits = linear.in_features, linear.out_features, num_bits
        self.bias = linear.bias
        rounded = round_to_groups(linear.weight.detach(), num_bits=num_bits)
        pairs = rounded.values.unflatten(1, (-1, 2))
        packed = rounded.values if num_bits == 8 else (pairs[..., 0] & 15) | (pairs[..., 1] << 4)
        self.register_buffer("values", packed)
        self.register_buffer("scales", rounded.scales)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        values = self.values
        if self.num_bits == 4:  # shifts of signed bytes keep the sign
            values = torch.stack((values << 4 >> 4, values >> 4), dim=-1).flatten(1)
        return (values.unflatten(1, (self.scales.shape[1], -1)) * self.scales.float()[..., None]).flatten(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return _Product.apply(x, self)


def quantize_linears(model: nn.Module, *, num_bits: Literal[4, 8], but: torch.Tensor) -> None:
    """In place: all linear layers except those whose weight is `but`."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module.weight is not but:
            model.set_submodule(name, QuantizedLinear(module, num_bits))
