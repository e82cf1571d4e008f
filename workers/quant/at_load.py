"""Dense weights that are quantised while they are loaded, on the device that computes with them.

Each shard is rounded when it is read, so the device never holds more than one shard of a layer as it was. Knows how numbers are rounded; a
`Pack` knows how they are kept and multiplied. Knows no ranks and no files.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from workers.config import Quantization
from workers.quant.grouped import quantize_weight
from workers.quant.method import WeightLoader, WeightMethod
from workers.quant.quantized import Float8Tensor, NumBits, QuantizedTensor, StoredValues, dense_values
from workers.quant.stored import Pack, StoredMethod

LARGEST_FLOAT8 = 448.0  # of float8_e4m3fn
# While they are rounded, so many numbers at a time take up to 30 bytes each.
ROUNDED_AT_ONCE = 1 << 23

Round = Callable[[torch.Tensor], QuantizedTensor | Float8Tensor]


class AtLoadMethod:
    """See `WeightMethod`. A tied output head stays in the embedding's form, and `tied` computes it."""

    shares_embedding = True

    def __init__(self, quantization: Quantization, pack: Pack, *, device: torch.device, tied: WeightMethod) -> None:
        self.round_weight = ROUNDS[quantization]
        self.stored = StoredMethod(pack)
        self.device = device
        self.tied = tied

    def create(
        self,
        layer: nn.Module,
        out_features: int,
        in_features: int,
        *,
        weight_loader: WeightLoader,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.stored.create(layer, out_features, in_features, weight_loader=weight_loader, dtype=dtype, device=device)
        setattr(layer, "is_rounded", True)  # noqa: B010 (mypy knows no such attribute)

    def load(self, layer: nn.Module, values: StoredValues, rows: slice) -> int:
        # What is kept gets memory of its own. In pieces of what rounding took, the rest of each piece would be lost: 0.5 GB of a 7B model.
        self._give_back_memory()
        rounded = self.round_weight(dense_values(values).to(self.device))
        self._give_back_memory()
        return self.stored.load(layer, rounded, rows)

    def finish(self, layer: nn.Module) -> None:
        self._method_of(layer).finish(layer)

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return self._method_of(layer).apply(layer, x, bias)

    def _give_back_memory(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _method_of(self, layer: nn.Module) -> WeightMethod:
        return self.stored if hasattr(layer, "is_rounded") else self.tied


def round_to_groups(weight: torch.Tensor, *, num_bits: NumBits) -> QuantizedTensor:
    """See `quantize_weight`, whose groups these are."""
    parts = [quantize_weight(part, num_bits=num_bits) for part in weight.split(_rows_at_once(weight))]
    values, scales = (torch.cat(one) for one in zip(*parts, strict=True))
    return QuantizedTensor(values=values, scales=scales, minima=None, num_bits=num_bits)


def round_to_float8(weight: torch.Tensor) -> Float8Tensor:
    """Each row's scale makes its largest value the largest of the type."""
    values = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
    scales = torch.empty((len(weight), 1), dtype=torch.float32, device=weight.device)
    num_rows = _rows_at_once(weight)
    for start in range(0, len(weight), num_rows):
        rows = slice(start, start + num_rows)
        part = weight[rows].float()
        scale = part.abs().amax(dim=1, keepdim=True) / LARGEST_FLOAT8
        scaled = part / scale.masked_fill(scale == 0, 1.0)
        values[rows], scales[rows] = scaled.clamp_(-LARGEST_FLOAT8, LARGEST_FLOAT8).to(values.dtype), scale
    return Float8Tensor(values=values, scales=scales, block_size=weight.shape[1])


ROUNDS: dict[Quantization, Round] = {
    "int8": partial(round_to_groups, num_bits=8),
    "int4": partial(round_to_groups, num_bits=4),
    "fp8": round_to_float8,
}


def _rows_at_once(weight: torch.Tensor) -> int:
    return max(1, ROUNDED_AT_ONCE // weight.shape[1])
