"""The product with packed weights: right in every form, and a row has the same bits alone, among others and in any chunk."""

from itertools import product

import pytest
import torch
from support.packed_weights import FORMS, Form, packed, randn

from workers.kernels.grouped import specification
from workers.kernels.grouped.grouped_matmul import choose_tile, grouped_matmul

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def assert_close(got, expected):
    tolerance = TOLERANCES[expected.dtype]
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * expected.float().abs().max().item())


@pytest.mark.parametrize(
    ("form", "dtype"),
    [*((form, torch.bfloat16) for form in FORMS), *product(FORMS[::4], (torch.float32, torch.float16))],
    ids=str,
)
def test_equals_the_specification(form, dtype):
    weight, bias = packed(form, 40, 256), randn(40, seed=3).to(dtype)
    x = randn(17, 256 + 8, seed=4).to(dtype)[:, :256]  # rows further apart than they are long
    for num_rows, b in ((17, None), (3, bias)):
        out = grouped_matmul(x[:num_rows], weight, b)
        assert out.dtype == dtype and out.is_contiguous()
        assert_close(out, specification.grouped_matmul(x[:num_rows], weight, b))


@pytest.mark.parametrize("in_features", [32, 96, 160])
@pytest.mark.parametrize("form", [Form(4, 32), Form(4, None, has_minima=True), Form(8, 32)], ids=str)
def test_a_row_may_end_within_a_block(form, in_features):
    weight, x = packed(form, 33, in_features), randn(2, in_features)
    assert_close(grouped_matmul(x, weight), specification.grouped_matmul(x, weight))


def test_no_rows():
    assert grouped_matmul(randn(0, 64), packed(Form(8, 32), 8, 64)).shape == (0, 8)


@pytest.mark.parametrize("form", [Form(4, 32), Form(4, 128, has_minima=True, halves=False), Form(8, None)], ids=str)
def test_a_row_has_the_same_bits_alone_and_in_any_chunk(form):
    weight, x = packed(form, 70, 256), randn(75, 256).bfloat16()
    whole = grouped_matmul(x, weight, deterministic=True)
    for start, end in [(0, 1), (74, 75), (40, 56), (0, 32), (32, 64), (1, 8), (13, 70)]:
        part = grouped_matmul(x[start:end], weight, deterministic=True)
        assert torch.equal(part, whole[start:end]), f"rows {start} to {end}"


def test_with_deterministic_the_weight_alone_chooses_the_tile():
    assert len({choose_tile(rows, 4096, deterministic=True) for rows in (1, 16, 17, 4096)}) == 1
    assert choose_tile(1, 4096, deterministic=False).rows < choose_tile(17, 4096, deterministic=False).rows
    assert choose_tile(1, 28_672, deterministic=False).outputs > choose_tile(1, 4096, deterministic=False).outputs


def test_integers_are_multiplied_exactly():
    """bfloat16 holds whole numbers up to 256, so the product of small ones is exact, whatever its scale."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-8, 9, (5, 128), generator=generator).bfloat16()
    for form in (Form(4, 32), Form(8, 32)):
        weight = packed(form, 16, 128)
        exact = specification.grouped_matmul(x.double().float(), weight)
        assert torch.equal(grouped_matmul(x.float(), weight), grouped_matmul(x.float(), weight))
        assert torch.equal(grouped_matmul(x, weight), exact.bfloat16())
