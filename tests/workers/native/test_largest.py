"""The largest of each row: torch's own answer, where values are equal, infinite or not numbers too."""

import pytest
import torch
from support.native import native_library

from workers.native.largest import largest


@pytest.mark.parametrize("num_values", [1, 7, 64, 1000, 1024, 4099])
def test_it_is_what_torch_finds(num_values):
    native_library("avx2")
    generator = torch.Generator().manual_seed(num_values)
    # Whole numbers, so that many are equal.
    x = torch.randint(-50, 50, (9, num_values), generator=generator).float()
    x[1] = -torch.inf
    x[2, num_values // 2] = torch.inf
    x[3] = -0.0
    x[4, num_values // 3 :] = torch.nan
    x[5, -1] = torch.nan
    x[6, 0] = torch.nan
    values, places = largest(x)
    expected = x.max(dim=-1)
    assert torch.equal(places, expected.indices)
    assert torch.equal(values.nan_to_num(7e7), expected.values.nan_to_num(7e7))


def test_rows_apart_from_each_other_are_left_to_torch():
    x = torch.arange(12.0).view(3, 4).t()
    values, places = largest(x)
    assert (values.tolist(), places.tolist()) == ([8.0, 9.0, 10.0, 11.0], [2, 2, 2, 2])
