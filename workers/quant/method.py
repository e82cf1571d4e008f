"""The seam between a linear layer and the form of its weight matrix.

A layer knows which part of a matrix is its own; a method knows how that part is kept in memory and multiplied. Knows no ranks, no
checkpoint names and no files.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import nn

from workers.errors import CheckpointError
from workers.quant.quantized import StoredValues

Index = slice | tuple[slice, ...]


class WeightSource(Protocol):
    """A tensor in a checkpoint, read only where it is indexed. `name` names tensor and file, for messages.

    shape: of the matrix, however it is stored.
    """

    name: str
    shape: tuple[int, ...]

    def __getitem__(self, index: Index) -> StoredValues: ...


WeightLoader = Callable[[nn.Parameter, WeightSource, str | None], int]


class WeightMethod(Protocol):
    """One form of a weight matrix [out_features, in_features]. Stateless: the parameters belong to the layer.

    A layer calls `create` when it is built, `load` for each shard of the checkpoint, `finish` after the last, and then `apply`. A tied
    output head calls no `create` and no `load` if the method `shares_embedding`: it has the embedding's parameter as its `weight`, with
    which `finish` must cope.
    """

    shares_embedding: bool

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
        """Registers the layer's unfilled parameters, among them `weight`. Each carries its loader, see `new_weight`."""
        ...

    def load(self, layer: nn.Module, values: StoredValues, rows: slice) -> int:
        """Fills the given output rows, all of their inputs, from `values` [num_rows, in_features], quantised or of any float type. Returns
        how many elements of `layer.weight` are filled by it.
        """
        ...

    def finish(self, layer: nn.Module) -> None:
        """Every shard is loaded: replaces the parameters by what computes fastest. Changes none of them in place."""
        ...

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x @ weight.T + bias. x: [num_tokens, in_features] -> [num_tokens, out_features]; bias: [out_features]."""
        ...


# {a module's name: the method of its weight}, for example of "model.layers.0.self_attn.qkv_proj".
WeightMethods = Callable[[str], WeightMethod]


def new_weight(
    shape: tuple[int, ...], weight_loader: WeightLoader, *, dtype: torch.dtype, device: torch.device | str
) -> nn.Parameter:
    """An unfilled parameter. `weight_loader(parameter, source, shard_id)` copies this rank's part of `source` into it and returns how
    many of the parameter's elements it filled. It raises CheckpointError if the source has the wrong shape.
    """
    parameter = nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)
    setattr(parameter, "weight_loader", weight_loader)  # noqa: B010 (mypy knows no such attribute)
    return parameter


def check_shape(source: WeightSource, shape: tuple[int, ...]) -> None:
    if tuple(source.shape) != shape:
        raise CheckpointError(
            f"{source.name} has shape {list(source.shape)}, but the model's configuration asks for {list(shape)}."
        )
