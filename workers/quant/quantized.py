"""Matrices as a quantised checkpoint stores them, on their way from a file into a layer: whole numbers with scales, or 8-bit floats.

Knows their arithmetic, and how rows and columns are taken out of them. Knows no files, no ranks and no checkpoint names.
"""

from dataclasses import dataclass, replace

import torch
from torch.nn import functional

from workers.quant.forms import NumBits

# Of 4 bits they are from 0 to 16; the sum of a group's inputs times this is far from the end of what float32 counts exactly, 2^24.
LARGEST_ZERO_POINT = 255


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedTensor:
    """weight[o, i] = values[o, i] * scales[o, i // group_size] + minima[o, i // group_size].

    values: [out_features, in_features] int8: -8 to 7 of 4 bits, 0 to 15 with minima; -128 to 127 of 8 bits.
    scales, minima: [out_features, in_features / group_size], float16 or float32, whichever holds the stored numbers exactly.
    inputs: None, or [in_features] int64 where the columns are in another order than the inputs, and may repeat one with a weight of 0:
    with inputs [2, 0, 1], the columns are those of inputs 2, 0 and 1.
    """

    values: torch.Tensor
    scales: torch.Tensor
    minima: torch.Tensor | None
    num_bits: NumBits
    inputs: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    @property
    def group_size(self) -> int:
        return self.values.shape[1] // self.scales.shape[1]

    def __len__(self) -> int:
        return self.values.shape[0]

    def take_rows(self, rows: slice | torch.Tensor) -> "QuantizedTensor":
        """rows: a slice, or indices [num_rows]."""
        minima = None if self.minima is None else self.minima[rows]
        return replace(self, values=self.values[rows], scales=self.scales[rows], minima=minima)

    def take_columns(self, start: int, stop: int) -> "QuantizedTensor":
        """Whole groups only, of a tensor whose columns are in the order of the inputs."""
        size = self.group_size
        assert start % size == 0 and stop % size == 0 and self.inputs is None, (start, stop, size)
        groups = slice(start // size, stop // size)
        minima = None if self.minima is None else self.minima[:, groups]
        return replace(self, values=self.values[:, start:stop], scales=self.scales[:, groups], minima=minima)

    def pad_rows(self, num_rows: int) -> "QuantizedTensor":
        """With rows of zeros up to `num_rows`."""
        minima = None if self.minima is None else _pad(self.minima, num_rows)
        return replace(self, values=_pad(self.values, num_rows), scales=_pad(self.scales, num_rows), minima=minima)

    def regroup(self, group_size: int) -> "QuantizedTensor":
        """The same in smaller groups, of a size that divides the present one: each repeats its scale."""
        times = self.group_size // group_size
        assert times * group_size == self.group_size, (self.group_size, group_size)
        if times == 1:
            return self
        minima = None if self.minima is None else self.minima.repeat_interleave(times, dim=1)
        return replace(self, scales=self.scales.repeat_interleave(times, dim=1), minima=minima)

    def zero_points(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Scales and zero points, both float16, with weight = (values - zero points) * scales exactly; None if there are
        none such, or if half precision does not hold them. Only of 4 bits: zero points of 8 bits may not fit into sums of 32 bits.
        """
        if self.minima is None or self.num_bits != 4:
            return None
        scales = self.scales.float()
        zeros = torch.where(scales == 0, 0.0, (-self.minima.float() / scales).round())
        half, half_zeros = scales.half(), zeros.half()
        is_exact = torch.equal(half.float(), scales) and torch.equal(half_zeros.float() * scales, -self.minima.float())
        return (half, half_zeros) if is_exact and bool((zeros.abs() <= LARGEST_ZERO_POINT).all()) else None

    def dequantize(self) -> torch.Tensor:
        """[out_features, number of inputs] float32."""
        groups = self.values.float().unflatten(1, (-1, self.group_size)) * self.scales.float()[..., None]
        if self.minima is not None:
            groups += self.minima.float()[..., None]
        weight = groups.flatten(1)
        if self.inputs is None:
            return weight
        num_inputs = int(self.inputs.max()) + 1
        return weight.new_zeros((len(self), num_inputs)).index_add_(1, self.inputs, weight)

    def is_finite(self) -> bool:
        return is_finite(self.scales) and (self.minima is None or is_finite(self.minima))


@dataclass(frozen=True, slots=True, eq=False)
class Float8Tensor:
    """weight[o, i] = values[o, i] * scales[o, i // (in_features / number of scales in a row)].

    values: [out_features, in_features] float8_e4m3fn. scales: float32, [1, 1] for the whole tensor, [out_features, 1], or [out_features,
    ceil(in_features / block_size)]. block_size: the inputs that share a scale. input_scale: float32, one number by which the checkpoint
    wants the inputs of the product divided before they are rounded to 8-bit floats; None: it leaves that to the product.
    """

    values: torch.Tensor
    scales: torch.Tensor
    block_size: int
    input_scale: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    def __len__(self) -> int:
        return self.values.shape[0]

    def take_rows(self, rows: slice | torch.Tensor) -> "Float8Tensor":
        scales = self.scales if len(self.scales) == 1 else self.scales[rows]
        return replace(self, values=self.values[rows], scales=scales)

    def pad_rows(self, num_rows: int) -> "Float8Tensor":
        scales = self.scales if len(self.scales) == 1 else _pad(self.scales, num_rows)
        # Zero is the byte 0 in this format too, and torch pads no float8.
        values = _pad(self.values.view(torch.int8), num_rows).view(self.values.dtype)
        return replace(self, values=values, scales=scales)

    def dequantize(self) -> torch.Tensor:
        """[out_features, in_features] float32."""
        scales = self.scales.repeat_interleave(self.block_size, dim=1)[:, : self.values.shape[1]]
        return self.values.float() * (self.scales if self.scales.shape[1] == 1 else scales)

    def is_finite(self) -> bool:
        has_finite_scales = is_finite(self.scales) and (self.input_scale is None or is_finite(self.input_scale))
        return has_finite_scales and not bool(self.values.isnan().any())


# What a `WeightSource` gives.
StoredValues = torch.Tensor | QuantizedTensor | Float8Tensor


def dense_values(values: StoredValues) -> torch.Tensor:
    """As a plain tensor; quantised values become float32."""
    return values if isinstance(values, torch.Tensor) else values.dequantize()


def pad_rows(values: StoredValues, num_rows: int) -> StoredValues:
    if len(values) == num_rows:
        return values
    return _pad(values, num_rows) if isinstance(values, torch.Tensor) else values.pad_rows(num_rows)


def is_finite(values: torch.Tensor) -> bool:
    """Adds up all numbers, which takes a fifth of the time of copying them. The sum is finite only if all are; the sum of finite numbers
    may overflow, so then the numbers decide.
    """
    return bool(values.sum().isfinite()) or bool(torch.stack(torch.aminmax(values)).isfinite().all())


def _pad(tensor: torch.Tensor, num_rows: int) -> torch.Tensor:
    return functional.pad(tensor, (0, 0, 0, num_rows - len(tensor)))
