"""What stored values become on a GPU: 8 or 4 bits for the kernels of kernels/grouped, 8-bit floats for the GPU's own product of them.

Knows which product computes how many rows; no layers and no files. Needs Triton.
"""

from collections.abc import Sequence

import torch

from workers.kernels.grouped.dequantize import dequantize
from workers.kernels.grouped.grouped_matmul import grouped_matmul
from workers.kernels.grouped.packed import PackedWeight, group_size_for, pack
from workers.kernels.grouped.quantize_rows import quantize_rows
from workers.quant.at_load import LARGEST_FLOAT8
from workers.quant.method import WeightMethod
from workers.quant.pack_dense import pack_as_dense
from workers.quant.quantized import Float8Tensor, QuantizedTensor, StoredValues, dense_values
from workers.quant.stored import Matrix, Pack, note_input_scale

# Up to so many rows the kernel that takes weights apart as it multiplies is at least as fast as the library after writing them in 16 bits.
# By arithmetic, for a 7B model of 4 bits: the kernel needs 0.09 ms a row on an H100, where it has too few instructions a second, 0.14 on an
# A100 and 0.29 on an A10G; the library 0.02, 0.065 and 0.25 after 5 to 10, 12 to 21 and 30 to 54 ms of writing, and reading again what the
# L2 cache does not hold. They meet at 80 to 140, 160 to 280 and over 700 rows. `tramontane doctor --gpu` measures both.
MAX_FUSED_ROWS = 128
# What is written for the library at a time: 4,096 rows of 4,096 weights. Less than the L2 cache of an A100 (40 MB) holds.
WORKSPACE_BYTES = 32 << 20
# The first GPUs with a product of 8-bit floats, and what its sizes must be multiples of.
FLOAT8_CAPABILITY = (8, 9)
FLOAT8_MULTIPLE = 16


def cuda_pack(
    dense: WeightMethod,
    *,
    capability: tuple[int, int],
    deterministic: bool = False,
    max_fused_rows: int = MAX_FUSED_ROWS,
) -> Pack:
    """dense: computes what has no product of its form. deterministic: a row has the same bits whatever is computed beside it."""
    pack_dense = pack_as_dense(dense)

    def pack_values(values: StoredValues, dtype: torch.dtype, device: torch.device) -> Matrix:
        if isinstance(values, Float8Tensor):
            if capability >= FLOAT8_CAPABILITY and not deterministic and _fits_float8(values):
                return note_input_scale(Float8Matrix(values, device), values, is_used=True)
            values_of_groups = _in_groups(values)
            if values_of_groups is not None:
                weight = pack(*values_of_groups, num_bits=8, device=device)
                matrix = GroupedMatrix(weight, deterministic=deterministic, max_fused_rows=max_fused_rows)
                return note_input_scale(matrix, values, is_used=False)
            return note_input_scale(pack_dense(values.dequantize(), dtype, device), values, is_used=False)
        if isinstance(values, QuantizedTensor):
            size = group_size_for(values.group_size, in_features=values.shape[1], num_bits=values.num_bits)
            if size is not None:
                v = values.regroup(size)
                weight = pack(v.values, v.scales, v.minima, num_bits=v.num_bits, device=device)
                inputs = None if v.inputs is None else v.inputs.to(device)
                return GroupedMatrix(weight, inputs, deterministic=deterministic, max_fused_rows=max_fused_rows)
        return pack_dense(dense_values(values), dtype, device)

    return pack_values


class GroupedMatrix:
    """See `Matrix`. Which product computes, and what it allocates, follows from the number of rows alone, so it can be captured.

    inputs: the columns of the weight are those of these inputs; None: of all, in order.
    """

    def __init__(
        self,
        weight: PackedWeight,
        inputs: torch.Tensor | None = None,
        *,
        deterministic: bool = False,
        max_fused_rows: int = MAX_FUSED_ROWS,
    ) -> None:
        self.weight = weight
        self.inputs = inputs
        self.deterministic = deterministic
        self.max_fused_rows = max_fused_rows

    @property
    def tensors(self) -> Sequence[torch.Tensor]:
        return self.weight.tensors if self.inputs is None else (*self.weight.tensors, self.inputs)

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        if self.inputs is not None:
            x = x.index_select(1, self.inputs)
        if self.deterministic or len(x) <= self.max_fused_rows:
            return grouped_matmul(x, self.weight, deterministic=self.deterministic)
        return _multiply_in_slices(x, self.weight)


class Float8Matrix:
    """See `Matrix`. The inputs, too, are rounded to 8-bit floats, each row with its own scale, or all with the checkpoint's. Each output
    has one scale.
    """

    def __init__(self, values: Float8Tensor, device: torch.device) -> None:
        assert _fits_float8(values)
        self.values = values.values.to(device).contiguous()
        self.scales = values.scales.to(device).expand(len(values), 1).T.contiguous()  # [1, out_features]
        self.tensors = (self.values, self.scales)
        self.input_scale = None if values.input_scale is None else values.input_scale.to(device)
        self._one = torch.ones((), dtype=torch.float32, device=device)

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        quantized, scales = quantize_rows(x) if self.input_scale is None else round_by(x, self.input_scale)
        if x.dtype == torch.bfloat16:
            return torch._scaled_mm(quantized, self.values.T, scales, self.scales, out_dtype=torch.bfloat16)
        # With a scale for each row the library's product gives bfloat16 only.
        product = torch._scaled_mm(quantized, self.values.T, self._one, self._one, out_dtype=torch.float32)
        return (product * scales * self.scales).to(x.dtype)


def round_by(x: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As `quantize_rows`, with one scale for all rows: what is too large becomes the largest of the type, as in vLLM."""
    values = (x.float() * (1.0 / scale)).clamp_(-LARGEST_FLOAT8, LARGEST_FLOAT8).to(torch.float8_e4m3fn)
    return values, scale.view(1, 1).expand(len(x), 1).contiguous()


def _multiply_in_slices(x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """The library's product with the weight in the dtype of x, of which one slice at a time exists."""
    out = x.new_empty((len(x), weight.out_features))
    num_rows = min(weight.out_features, max(1, WORKSPACE_BYTES // (weight.in_features * x.element_size())))
    workspace = x.new_empty((num_rows, weight.in_features))
    for start in range(0, weight.out_features, num_rows):
        stop = min(start + num_rows, weight.out_features)
        dequantize(weight, workspace[: stop - start], first_row=start)
        torch.mm(x, workspace[: stop - start].T, out=out[:, start:stop])
    return out


def _fits_float8(values: Float8Tensor) -> bool:
    return values.scales.shape[1] == 1 and not any(size % FLOAT8_MULTIPLE for size in values.shape)


def _in_groups(values: Float8Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """values and scales [out_features, num_groups] as the kernels read them; None where they cannot."""
    out_features, in_features = values.shape
    if in_features % values.block_size:
        # The last scale is of fewer inputs.
        return None
    size = group_size_for(values.block_size, in_features=in_features, num_bits=8)
    if size is None:
        return None
    scales = values.scales.expand(out_features, -1)
    return values.values, scales.repeat_interleave(in_features // size // scales.shape[1], dim=1)
