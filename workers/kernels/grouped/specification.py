"""What the kernels of this folder compute, in plain torch: the specification of each, with its signature. Needs torch only."""

import torch

from workers.kernels.grouped.packed import PackedWeight, unpack

LARGEST_FLOAT8 = 448.0  # of float8_e4m3fn


def dequantize(weight: PackedWeight, out: torch.Tensor, *, first_row: int = 0) -> None:
    """Writes the rows from `first_row` on, rounded once to the dtype of out. out: [num_rows, in_features]."""
    out.copy_(_exact(weight)[first_row : first_row + len(out)])


def grouped_matmul(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None, *, deterministic: bool = False
) -> torch.Tensor:
    """x @ weight.T + bias, summed in fp32, with weights that are not rounded. x: [num_tokens, in_features]; bias: [out_features].

    deterministic: a row has the same bits whatever other rows there are.
    """
    product = x.float() @ _exact(weight).T
    return (product if bias is None else product + bias.float()).to(x.dtype)


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(values, scales): x ~ values * scales, values [num_rows, in_features] float8_e4m3fn, scales [num_rows, 1] float32.

    x: [num_rows, in_features]. Each row's scale makes its largest value the largest of the type; NaN makes its row's scale NaN.
    """
    wide = x.float()
    scales = wide.abs().amax(dim=1, keepdim=True) / LARGEST_FLOAT8
    scaled = wide / scales.masked_fill(scales == 0, 1.0)
    return scaled.clamp_(-LARGEST_FLOAT8, LARGEST_FLOAT8).to(torch.float8_e4m3fn), scales


def _exact(weight: PackedWeight) -> torch.Tensor:
    """[out_features, in_features] float32. A product of two halves is exact in it."""
    values, scales, minima = unpack(weight)
    groups = values.float().unflatten(1, (scales.shape[1], -1)) * scales.float()[..., None]
    return (groups if minima is None else groups + minima.float()[..., None]).flatten(1)
