"""Packed matrices: right products, rows that do not depend on each other, and the same bits on every instruction set."""

import pytest
import torch
from support.native import native_library

from workers.native.matrices import Columns, pack_dense, packs

SHAPES = [(7, 2), (33, 96), (64, 1024), (257, 130)]


@pytest.fixture(params=["amx", "avx512", "avx2"])
def library(request):
    return native_library(request.param)


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
def test_the_product_is_right_and_each_row_independent_of_the_others(library, dtype, out_features, in_features):
    weight, x = random(out_features, in_features, dtype=dtype), random(61, in_features, dtype=dtype, seed=1)
    matrix = pack_dense(library, weight)
    whole = matrix.multiply(x)
    exact = x.double() @ weight.double().T
    # A chain of float32 sums, then one rounding to the dtype.
    torch.testing.assert_close(
        whole.double(), exact.to(dtype).double(), rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-3
    )
    for num_rows in (0, 1, 2, 5, 6, 7, 12, 13, 24, 60):
        assert torch.equal(matrix.multiply(x[:num_rows]), whole[:num_rows]), f"{num_rows} rows"
        assert torch.equal(matrix.multiply(x[61 - num_rows :]), whole[61 - num_rows :]), f"last {num_rows} rows"


def test_rows_may_have_any_stride(library):
    weight, x = random(40, 64), random(5, 192, seed=1)
    matrix = pack_dense(library, weight)
    assert torch.equal(matrix.multiply(x[:, 64:128]), matrix.multiply(x[:, 64:128].contiguous()))


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_the_number_of_threads_changes_no_bit(library, num_threads):
    weight, x = random(500, 256, dtype=torch.bfloat16), random(9, 256, dtype=torch.bfloat16, seed=1)
    matrix = pack_dense(library, weight)
    expected, before = matrix.multiply(x), torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        assert torch.equal(matrix.multiply(x), expected)
    finally:
        torch.set_num_threads(before)


def test_float32_has_the_same_bits_on_every_instruction_set():
    weight, x = random(100, 320), random(17, 320, seed=1)
    products = [pack_dense(native_library(name), weight).multiply(x) for name in ("avx512", "avx2")]
    assert torch.equal(*products)


def test_an_input_that_is_not_a_number_stays_in_its_row(library):
    weight, x = random(40, 64, dtype=torch.bfloat16), random(4, 64, dtype=torch.bfloat16, seed=1)
    matrix = pack_dense(library, weight)
    expected = matrix.multiply(x)
    x[2, 5] = torch.nan
    product = matrix.multiply(x)
    assert product[2].isnan().all()
    assert torch.equal(product[[0, 1, 3]], expected[[0, 1, 3]])


def test_pairs_of_bfloat16_need_an_even_number_of_inputs():
    assert packs(torch.float32, in_features=3) and packs(torch.bfloat16, in_features=4)
    assert not packs(torch.bfloat16, in_features=3) and not packs(torch.float16, in_features=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_columns_are_taken_in_any_order_from_rows_of_any_stride(library, dtype):
    x = torch.randn(7, 70, generator=torch.Generator().manual_seed(0)).to(dtype)[:, :64]
    inputs = torch.randint(0, 64, (96,), generator=torch.Generator().manual_seed(1))
    assert torch.equal(Columns(library, inputs).take(x), x[:, inputs])
    assert Columns(library, inputs).take(x[:0]).shape == (0, 96)


def test_a_product_can_be_written_beside_others(library):
    w, x = torch.randn(40, 64), torch.randn(5, 64)
    matrix, out = pack_dense(library, w), torch.full((5, 60), torch.nan)
    matrix.multiply_into(out[:, 10:50], x)
    assert torch.equal(out[:, 10:50], matrix.multiply(x))
    assert out[:, :10].isnan().all() and out[:, 50:].isnan().all()
