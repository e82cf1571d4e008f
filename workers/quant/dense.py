"""Weights as they are: one dense matrix in the engine's dtype, laid out for the compiled kernels or for oneDNN on a CPU.

Knows the products and when to use the deterministic one; no ranks and no layers.
"""

from collections.abc import Callable
from typing import cast

import torch
from torch import nn
from torch.nn import functional

from workers.native.library import NativeLibrary
from workers.native.matrices import PackedMatrix, pack_dense, packs
from workers.quant.method import WeightLoader, WeightMethod, new_weight
from workers.quant.quantized import StoredValues, dense_values

Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
CAN_PACK = torch.backends.mkldnn.is_available() and all(
    hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise")
)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x @ weight.T + bias. x: [num_tokens, in_features]; weight: [out_features, in_features], possibly packed by `pack`."""
    if not weight.is_mkldnn:
        return functional.linear(x, weight, bias)
    # One row may take another path through oneDNN, with other rounding. Two rows cost the same, and then every row's result is
    # bit for bit independent of the other rows.
    rows = x.expand(2, -1) if x.shape[0] == 1 else x
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")[: x.shape[0]]


def pack(weight: nn.Parameter) -> nn.Parameter:
    """The weight laid out for oneDNN, if it is float32 on a CPU that has it; otherwise the weight itself.

    Measured against F.linear on one thread: 1.1 to 3.3 times as fast at 2 to 16 rows, 6 to 25 % faster at 256 rows; slower at one row
    on small matrices (256 x 768: 25 us, not 15 us) and at every row count on 256 x 256. The deciding reason: a row's result no longer
    depends on the batch around it, so a request's tokens and log-probabilities do not either. Without packing (half types without the
    compiled kernels, a torch without oneDNN, CUDA without --deterministic) a request continues elsewhere with the same seed, but the last
    bits of its logits may differ.
    """
    if not CAN_PACK or weight.device.type != "cpu" or weight.dtype != torch.float32:
        return weight
    # The 16 is a typical number of rows, by which oneDNN chooses the layout.
    return nn.Parameter(torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 16), requires_grad=False)


class DenseMethod:
    """See `WeightMethod`. The only parameter is `weight` [out_features, in_features], until `finish` packs it.

    product: has the signature of `linear`. library: its kernels compute where they know the dtype.
    """

    shares_embedding = True

    def __init__(self, product: Product = linear, *, library: NativeLibrary | None = None) -> None:
        self.product = product
        self.library = library

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
        weight = new_weight((out_features, in_features), weight_loader, dtype=dtype, device=device)
        layer.register_parameter("weight", weight)

    def load(self, layer: nn.Module, values: StoredValues, rows: slice) -> int:
        target = _weight(layer)[rows]
        target.copy_(dense_values(values))
        return target.numel()

    def finish(self, layer: nn.Module) -> None:
        weight = _weight(layer)
        if self.library is not None and packs(weight.dtype, in_features=weight.shape[1]):
            set_matrix(layer, pack_dense(self.library, weight))
        elif self.product is linear:
            layer.register_parameter("weight", pack(weight))

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        matrix = get_matrix(layer)
        if matrix is None:
            return self.product(x, _weight(layer), bias)
        product = matrix.multiply(x)
        return product if bias is None else product + bias


DENSE = DenseMethod()


def ALL_DENSE(name: str) -> WeightMethod:  # noqa: N802 (a constant in all but its type)
    """The `WeightMethods` of a model without quantised weights."""
    return DENSE


def set_matrix(layer: nn.Module, matrix: PackedMatrix) -> None:
    """From now on the layer's weight is this one."""
    layer.register_parameter("weight", nn.Parameter(matrix.packed, requires_grad=False))
    setattr(layer, "matrix", matrix)  # noqa: B010 (mypy knows no such attribute)


def get_matrix(layer: nn.Module) -> PackedMatrix | None:
    return cast(PackedMatrix | None, getattr(layer, "matrix", None))


def _weight(layer: nn.Module) -> nn.Parameter:
    return cast(nn.Parameter, layer.weight)
