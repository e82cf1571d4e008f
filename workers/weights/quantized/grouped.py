"""A matrix of whole numbers in groups, read in slices: what GPTQ, AWQ and compressed-tensors have in common.

Knows groups, zero points and the order of inputs; a `Packing` knows where a format keeps the numbers. Knows no ranks.
"""

import math
from typing import Protocol

import torch

from workers.config import QUANTIZATION_GROUP_SIZE
from workers.errors import CheckpointError
from workers.quant.method import Index
from workers.quant.quantized import NumBits, QuantizedTensor


class Packing(Protocol):
    """How a format keeps one matrix. Numbers run from 0; weight = (number - zero point) * scale."""

    name: str
    shape: tuple[int, int]
    num_bits: NumBits
    num_groups: int

    def numbers(self, rows: slice, columns: slice) -> torch.Tensor:
        """[num_rows, num_columns] uint8."""
        ...

    def scales(self, rows: slice) -> torch.Tensor:
        """[num_rows, num_groups], of any float type."""
        ...

    def zero_points(self, rows: slice) -> torch.Tensor | None:
        """[num_rows, num_groups] int32; None where all are 2^(num_bits - 1)."""
        ...

    def groups(self) -> torch.Tensor | None:
        """[in_features] int64: the group of each input; None where they are in order and of one size."""
        ...


class GroupedMatrix:
    """A `WeightSource`."""

    def __init__(self, packing: Packing) -> None:
        self.name = packing.name
        self.shape: tuple[int, ...] = packing.shape
        self._packing = packing

    def __getitem__(self, index: Index) -> QuantizedTensor:
        rows_asked, columns_asked = index if isinstance(index, tuple) else (index, slice(None))
        rows = slice(*rows_asked.indices(self.shape[0])[:2])
        columns = slice(*columns_asked.indices(self.shape[1])[:2])
        packing = self._packing
        numbers, scales, zeros = packing.numbers(rows, columns), packing.scales(rows), packing.zero_points(rows)
        groups = packing.groups()
        if groups is not None:
            self._check_groups(groups)
        inputs = None
        if groups is None or _are_in_order(groups, packing.num_groups):
            group_size = self.shape[1] // packing.num_groups
            # A part of a group keeps its scale: of groups of 128, inputs 64 to 192 are two of 64.
            size = math.gcd(group_size, columns.start, columns.stop)
            chosen = torch.arange(columns.start, columns.stop, size) // group_size
            scales, zeros = scales[:, chosen], None if zeros is None else zeros[:, chosen]
        else:
            order = order_of_inputs(groups[columns], group_size=self.shape[1] // packing.num_groups)
            scales, zeros = scales[:, order.groups], None if zeros is None else zeros[:, order.groups]
            size = len(order.inputs) // len(order.groups)
            numbers = numbers.index_select(1, order.inputs)
            if len(padding := order.is_padding.nonzero().flatten()):
                # What fills a group up has a weight of 0.
                middle = torch.tensor(1 << (packing.num_bits - 1))
                numbers[:, padding] = (middle if zeros is None else zeros[:, padding // size]).to(torch.uint8)
            inputs = order.inputs
        return quantized_tensor(numbers, scales, zeros, num_bits=packing.num_bits, inputs=inputs)

    def _check_groups(self, groups: torch.Tensor) -> None:
        if len(groups) and (int(groups.min()) < 0 or int(groups.max()) >= self._packing.num_groups):
            raise CheckpointError(
                f"{self.name} has inputs of group {int(groups.max())}, but scales of {self._packing.num_groups} groups.",
                remedy="Download the checkpoint again.",
            )


class Order:
    """inputs: [num_columns] int64, see `QuantizedTensor`; groups: [num_columns / size], the group of each `size` columns."""

    def __init__(self, inputs: torch.Tensor, groups: torch.Tensor, is_padding: torch.Tensor) -> None:
        self.inputs = inputs
        self.groups = groups
        self.is_padding = is_padding


def order_of_inputs(groups: torch.Tensor, *, group_size: int) -> Order:
    """Sorts inputs by group. Groups of which this rank has only a part are filled up to multiples of 32.

    groups: [num_inputs] of this rank. If it were to multiples of 2, groups [1, 0, 1, 1] would become the inputs [1, 1, 0, 2, 3, 3] of the
    groups [0, 1, 1], the second 1 and the second 3 being padding.
    """
    order = torch.argsort(groups, stable=True)
    counts = torch.bincount(groups)
    is_present = counts > 0
    sizes, present = counts[is_present], is_present.nonzero().flatten()
    if bool((sizes == group_size).all()):
        return Order(order, present, torch.zeros(len(order), dtype=torch.bool))
    unit = QUANTIZATION_GROUP_SIZE
    inputs, padding, pieces = [], [], []
    for group, members in zip(present.tolist(), order.split(sizes.tolist()), strict=True):
        missing = -len(members) % unit
        inputs += [members, members[-1:].expand(missing)]
        padding += [torch.zeros(len(members), dtype=torch.bool), torch.ones(missing, dtype=torch.bool)]
        pieces += [group] * ((len(members) + missing) // unit)
    return Order(torch.cat(inputs), torch.tensor(pieces), torch.cat(padding))


def quantized_tensor(
    numbers: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    *,
    num_bits: NumBits,
    inputs: torch.Tensor | None = None,
) -> QuantizedTensor:
    """(numbers - zeros) * scales. numbers: uint8, from 0; zeros: whole numbers, None for 2^(num_bits - 1). Scales stay exact."""
    middle = 1 << (num_bits - 1)
    if zeros is None or bool((zeros == middle).all()):
        values = (numbers ^ 128).view(torch.int8) if num_bits == 8 else numbers.view(torch.int8) - middle
        half = scales.half()
        narrow = half if scales.dtype is torch.float16 or torch.equal(half.float(), scales.float()) else scales.float()
        return QuantizedTensor(values=values, scales=narrow, minima=None, num_bits=num_bits, inputs=inputs)
    wide = scales.float()
    if num_bits == 8:
        values, minima = (numbers ^ 128).view(torch.int8), (middle - zeros) * wide
    else:
        values, minima = numbers.view(torch.int8), -zeros * wide
    return QuantizedTensor(values=values, scales=wide, minima=minima, num_bits=num_bits, inputs=inputs)


def _are_in_order(groups: torch.Tensor, num_groups: int) -> bool:
    return torch.equal(groups, torch.arange(num_groups).repeat_interleave(len(groups) // num_groups))
