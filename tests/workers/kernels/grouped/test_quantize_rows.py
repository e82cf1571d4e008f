"""Inputs in 8-bit floats: the bits of the specification, a scale for each row, and what is not a number stays that."""

import pytest
import torch
from support.packed_weights import randn

from workers.kernels.grouped import specification
from workers.kernels.grouped.quantize_rows import quantize_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_has_the_bits_of_the_specification(dtype):
    x = (randn(7, 100 + 4) * torch.tensor([1e-3, 1.0, 100.0, 1.0, 1.0, 1.0, 1.0])[:, None]).to(dtype)[:, :100]
    x[3], x[4, 5], x[5] = 0, 3e4, 1e-30
    values, scales = quantize_rows(x)
    expected_values, expected_scales = specification.quantize_rows(x)
    assert torch.equal(scales, expected_scales) and scales.shape == (7, 1)
    assert torch.equal(values.view(torch.uint8), expected_values.view(torch.uint8))


def test_a_row_is_near_and_its_largest_value_is_exact():
    x = randn(3, 64) * 7
    values, scales = quantize_rows(x)
    near = values.float() * scales
    # Half of the distance of two neighbors: 3 bits of mantissa; and of the smallest ones.
    assert ((near - x).abs() <= (x.abs() / 16).clamp(min=scales / 512)).all()
    assert values.float().abs().amax(dim=1).eq(448).all()


def test_nan_and_infinity_spoil_their_row_alone():
    x = randn(3, 32)
    x[1, 4] = torch.nan
    x[2, 5] = torch.inf
    for function in (quantize_rows, specification.quantize_rows):
        values, scales = function(x)
        assert scales[1].isnan() and scales[2].isinf() and (values.float() * scales)[0].isfinite().all()
