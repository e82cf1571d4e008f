"""Packed weights as plain numbers: every form, every dtype, from any row on."""

from itertools import product

import pytest
import torch
from support.packed_weights import FORMS, Form, packed

from workers.kernels.grouped import specification
from workers.kernels.grouped.dequantize import dequantize


@pytest.mark.parametrize(
    ("form", "dtype"),
    [*((form, torch.bfloat16) for form in FORMS), *product(FORMS[::4], (torch.float32, torch.float16))],
    ids=str,
)
def test_equals_the_specification(form, dtype):
    weight = packed(form, 70, 256)
    for first_row, num_rows in ((0, 70), (37, 5)):
        got, expected = torch.empty(2, num_rows, 256, dtype=dtype).fill_(torch.nan)
        dequantize(weight, got, first_row=first_row)
        specification.dequantize(weight, expected, first_row=first_row)
        # A multiplication and an addition are rounded once or twice.
        torch.testing.assert_close(got, expected, rtol=torch.finfo(dtype).eps, atol=1e-7)


@pytest.mark.parametrize("in_features", [32, 96, 160])
def test_a_row_may_end_within_a_block(in_features):
    weight = packed(Form(4, 32), 3, in_features)
    got, expected = torch.empty(2, 3, in_features)
    dequantize(weight, got)
    specification.dequantize(weight, expected)
    torch.testing.assert_close(got, expected)


def test_the_specification_is_the_definition():
    """weight = value * scale + minimum, of the group of the input."""
    from workers.kernels.grouped.packed import pack

    values = torch.arange(64, dtype=torch.int8).view(1, 64) % 16
    weight = pack(values, torch.tensor([[2.0, -1.0]]).half(), torch.tensor([[0.5, 3.0]]).half(), num_bits=4)
    out = torch.empty(1, 64)
    specification.dequantize(weight, out)
    assert out[0, :3].tolist() == [0.5, 2.5, 4.5] and out[0, 32:35].tolist() == [3.0, 2.0, 1.0]
