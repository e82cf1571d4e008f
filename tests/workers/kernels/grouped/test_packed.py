"""Packing loses nothing, and puts each weight where the kernels look for it."""

import pytest
import torch
from support.packed_weights import FORMS, stored

from workers.kernels.grouped.packed import group_size_for, pack, unpack


def test_a_worked_example():
    """Word 1 of 4 bits holds the values 1, 33, 65 and 97, each 8 larger than it is."""
    values = torch.zeros(1, 128, dtype=torch.int8)
    values[0, [1, 33, 65, 97]] = torch.tensor([-8, 7, 1, -1], dtype=torch.int8)
    weight = pack(values, torch.tensor([[1.0, 2.0, 3.0, 4.0]]).half(), num_bits=4)
    assert weight.words.shape == (1, 1, 32)
    assert int(weight.words[0, 0, 1]) & 0xFFFF == 0 | 15 << 4 | 9 << 8 | 7 << 12
    assert int(weight.words[0, 0, 0]) & 0xFFFF == 0x8888
    assert weight.scales.dtype == torch.int64 and weight.scales.shape == (1, 1)
    assert weight.scales.view(torch.float16).tolist() == [[1.0, 2.0, 3.0, 4.0]]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("in_features", [256, 768])
def test_unpack_gives_what_was_packed(form, in_features):
    values, scales, minima = stored(form, 5, in_features)
    weight = pack(values, scales, minima, num_bits=form.num_bits)
    got_values, got_scales, got_minima = unpack(weight)
    assert got_values.dtype == values.dtype and torch.equal(got_values.view(torch.int8), values.view(torch.int8))
    assert torch.equal(got_scales, scales) and weight.halves == form.halves
    assert got_minima is None if minima is None else torch.equal(got_minima, minima)


@pytest.mark.parametrize(("num_bits", "in_features"), [(4, 160), (4, 32), (8, 96)])
def test_a_row_may_end_within_a_block(num_bits, in_features):
    for minima in (None, torch.ones(3, in_features // 32).half()):
        values = torch.ones(3, in_features, dtype=torch.int8)
        weight = pack(values, torch.ones(3, in_features // 32).half(), minima, num_bits=num_bits)
        got_values, got_scales, got_minima = unpack(weight)
        assert torch.equal(got_values, values) and got_scales.shape == (3, in_features // 32)
        assert (got_minima is None) == (minima is None)


def test_weights_of_4_bits_in_groups_of_32_take_4_and_a_half_bits():
    values, scales = torch.zeros(64, 4096, dtype=torch.int8), torch.ones(64, 128).half()
    for num_bits, bits in ((4, 4.5), (8, 8.5)):
        weight = pack(values, scales, num_bits=num_bits)
        assert sum(t.nbytes for t in weight.tensors) * 8 == values.numel() * bits
    weight = pack(values, scales, scales, num_bits=4)
    assert sum(t.nbytes for t in weight.tensors) * 8 == values.numel() * 5


def test_which_groups_the_kernels_read():
    def read(group_size, in_features=768):
        return group_size_for(group_size, in_features=in_features, num_bits=4)

    assert [read(size) for size in (32, 64, 128, 256, 768)] == [32, 64, 128, 256, 768]
    assert read(96) == 32 and read(192) == 64
    assert read(160, in_features=160) == 160, "one group of all inputs is of any size"
    assert read(16) is None and read(32, in_features=48) is None
