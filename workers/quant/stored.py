"""Weights in the form that their checkpoint has: of every shard its own, side by side in one layer where they differ.

Knows when a layer is complete and how its parts are joined; a `Pack` knows what a device computes with. Knows no ranks and no files.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Protocol, cast, runtime_checkable

import torch
from torch import nn

from workers.device.memory import gigabytes
from workers.quant.method import WeightLoader, new_weight
from workers.quant.quantized import Float8Tensor, QuantizedTensor, StoredValues


class Matrix(Protocol):
    """A weight [out_features, in_features] that computes. tensors: what it keeps in memory. One that is dense says so by `is_dense`; where
    the checkpoint has a scale for its inputs, `rounds_statically` says whether it is used.
    """

    @property
    def tensors(self) -> Sequence[torch.Tensor]: ...

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """x @ weight.T. x: [num_tokens, in_features] -> [num_tokens, out_features] in the dtype of x."""
        ...


@runtime_checkable
class WritesInto(Protocol):
    """A `Matrix` that can write its product beside others'."""

    out_features: int

    def multiply_into(self, out: torch.Tensor, x: torch.Tensor) -> None:
        """out: [num_tokens, out_features], rows of any stride."""
        ...


# Called with the values on the CPU, the dtype of the inputs, and the device that the matrix is for.
Pack = Callable[[StoredValues, torch.dtype, torch.device], Matrix]


class StoredMethod:
    """See `WeightMethod`. Until a layer's last shard is there, `weight` is a parameter without memory, of the matrix's shape.

    Each layer gets its final form when its last shard is loaded: of a model in 4 bits, only one layer's values take a byte each at a time.
    """

    shares_embedding = False

    def __init__(self, pack: Pack) -> None:
        self.pack = pack

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
        weight = new_weight((out_features, in_features), weight_loader, dtype=torch.int8, device="meta")
        layer.register_parameter("weight", weight)
        setattr(layer, "parts", _Parts(dtype, torch.device(device)))  # noqa: B010 (mypy knows no such attribute)

    def load(self, layer: nn.Module, values: StoredValues, rows: slice) -> int:
        parts = _parts(layer)
        out_features, in_features = cast(nn.Parameter, layer.weight).shape
        start, stop, _ = rows.indices(out_features)
        assert len(values) == stop - start and start not in parts.shards, (len(values), start, stop)
        parts.shards[start] = values
        if sum(map(len, parts.shards.values())) == out_features:
            in_order = [values for _, values in sorted(parts.shards.items())]
            parts.shards.clear()
            del layer.weight
            for values_of_part in join(in_order):
                matrix = self.pack(values_of_part, parts.dtype, parts.device)
                for tensor in matrix.tensors:
                    name = "weight" if "weight" not in layer._parameters else f"weight{len(layer._parameters)}"
                    layer.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
                parts.matrices.append(matrix)
        return (stop - start) * in_features

    def finish(self, layer: nn.Module) -> None:
        assert _parts(layer).matrices and not _parts(layer).shards

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        product = _multiply(_parts(layer).matrices, x)
        return product if bias is None else product + bias


def _multiply(matrices: Sequence[Matrix], x: torch.Tensor) -> torch.Tensor:
    if len(matrices) == 1:
        return matrices[0].multiply(x)
    writing = [matrix for matrix in matrices if isinstance(matrix, WritesInto)]
    if len(writing) < len(matrices):
        return torch.cat([matrix.multiply(x) for matrix in matrices], dim=1)
    out = x.new_empty((x.shape[0], sum(matrix.out_features for matrix in writing)))
    start = 0
    for matrix in writing:
        matrix.multiply_into(out[:, start : start + matrix.out_features], x)
        start += matrix.out_features
    return out


def join(values: Sequence[StoredValues]) -> list[StoredValues]:
    """Neighbors of one form as one: [int4 [8, 64], int4 [4, 64], int8 [4, 64]] -> [int4 [12, 64], int8 [4, 64]]."""
    joined: list[StoredValues] = []
    for one in values:
        both = _concatenate(joined[-1], one) if joined else None
        if both is None:
            joined.append(one)
        else:
            joined[-1] = both
    return joined


def note_input_scale(matrix: Matrix, values: Float8Tensor, *, is_used: bool) -> Matrix:
    """The matrix, which says what became of the checkpoint's scale of its inputs."""
    if values.input_scale is not None:
        setattr(matrix, "rounds_statically", is_used)  # noqa: B010 (not of the Protocol)
    return matrix


def describe_stored(modules: Iterable[nn.Module]) -> str | None:
    """Sentences on what the stored weights of a model have become, and how many bytes they take; None without any."""
    matrices = [
        matrix for module in modules if isinstance(p := getattr(module, "parts", None), _Parts) for matrix in p.matrices
    ]
    dense = [matrix for matrix in matrices if getattr(matrix, "is_dense", False)]
    kept = [matrix for matrix in matrices if matrix not in dense]
    sentences = []
    if kept:
        sentences.append(f"{len(kept)} quantised matrices keep their bits and take {_size(kept)}.")
    if dense:
        sentences.append(
            f"{len(dense)} matrices are computed dense and take {_size(dense)}: there is no product of their form here."
        )
    static = [m.rounds_statically for m in matrices if hasattr(m, "rounds_statically")]
    if any(static):
        sentences.append(f"{sum(static)} matrices round their inputs by the checkpoint's static scales (input_scale).")
    if not all(static):
        sentences.append(
            f"The static scales of inputs (input_scale) of {len(static) - sum(static)} matrices have no effect: their inputs are not "
            "rounded to 8-bit floats here."
        )
    return " ".join(sentences) or None


def _size(matrices: Iterable[Matrix]) -> str:
    return gigabytes(sum(tensor.nbytes for matrix in matrices for tensor in matrix.tensors))


class _Parts:
    """What a layer holds. shards: {first row: values}, until all are there."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self.device = device
        self.shards: dict[int, StoredValues] = {}
        self.matrices: list[Matrix] = []


def _parts(layer: nn.Module) -> _Parts:
    return cast(_Parts, layer.parts)


def _concatenate(a: StoredValues, b: StoredValues) -> StoredValues | None:
    """None if they differ in form."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return torch.cat((a, b)) if a.dtype == b.dtype else None
    if isinstance(a, Float8Tensor) and isinstance(b, Float8Tensor):
        if a.block_size != b.block_size or a.scales.shape[1] != b.scales.shape[1] or not _round_inputs_alike(a, b):
            return None
        scales = torch.cat([t.scales.expand(len(t), -1) for t in (a, b)])
        return replace(
            a,
            values=torch.cat((a.values.view(torch.int8), b.values.view(torch.int8))).view(a.values.dtype),
            scales=scales,
        )
    if not isinstance(a, QuantizedTensor) or not isinstance(b, QuantizedTensor) or _key(a) != _key(b):
        return None
    if a.inputs is not None and b.inputs is not None and not torch.equal(a.inputs, b.inputs):
        return None
    minima = None if a.minima is None or b.minima is None else torch.cat((a.minima, b.minima))
    return replace(a, values=torch.cat((a.values, b.values)), scales=torch.cat((a.scales, b.scales)), minima=minima)


def _round_inputs_alike(a: Float8Tensor, b: Float8Tensor) -> bool:
    if a.input_scale is None or b.input_scale is None:
        return a.input_scale is b.input_scale
    return torch.equal(a.input_scale, b.input_scale)


def _key(t: QuantizedTensor) -> tuple[object, ...]:
    return (t.num_bits, t.scales.dtype, t.minima is None, t.group_size, t.inputs is None, t.shape[1])
