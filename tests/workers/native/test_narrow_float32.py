"""Products in float32 with weights that bfloat16 holds exactly: half of the memory, without AMX the bits of all other float32, and with it
as exact.
"""

import math

import pytest
import torch
from support.native import native_library

from workers.kernels.layers.native_layers import NativeLayerKernels
from workers.native.matrices import PackedMatrix, pack_dense

# Around a tile of rows, a pair of panels, a step of 32 inputs, a slice of steps, and more than one block of rows.
SHAPES = [(7, 2), (33, 96), (96, 130), (257, 1024), (192, 1090)]
NUM_ROWS = (0, 1, 2, 5, 12, 15, 16, 17, 31, 32, 33, 64, 255, 257, 290)


@pytest.fixture(params=["amx", "avx512", "avx2"])
def library(request):
    return native_library(request.param)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def narrow(*shape, seed=0):
    return randn(*shape, seed=seed).bfloat16().float()


def wide_form(library, weight) -> PackedMatrix:
    """The same weights, but for one more row that needs all bits."""
    matrix = pack_dense(library, torch.cat((weight, torch.full((1, weight.shape[1]), 1 / 3))))
    assert matrix.packed.dtype is torch.float32
    return matrix


@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
def test_the_bits_are_those_of_float32_or_better_and_rows_are_independent(library, out_features, in_features):
    weight, x = narrow(out_features, in_features), randn(max(NUM_ROWS), in_features + 6, seed=1)[:, 6:]
    matrix = pack_dense(library, weight)
    assert matrix.packed.dtype is torch.bfloat16
    product, expected = matrix.multiply(x), wide_form(library, weight).multiply(x)[:, :-1]
    if library.variant == "amx":
        exact = x.double() @ weight.double().T
        assert error(product, exact) <= error(expected, exact)
        assert (product - exact).abs().max() <= 2 * (expected - exact).abs().max()
    else:
        assert torch.equal(product, expected)
    for num_rows in NUM_ROWS:
        assert torch.equal(matrix.multiply(x[:num_rows]), product[:num_rows]), f"{num_rows} rows"
        last = len(x) - num_rows
        assert torch.equal(matrix.multiply(x[last:]), product[last:]), f"last {num_rows} rows"


def error(product, exact):
    return (product.double() - exact).pow(2).mean().sqrt()


@pytest.mark.parametrize("in_features", [130, 1088])
def test_a_fused_product_has_the_bits_of_its_parts(library, in_features):
    matrix, x = pack_dense(library, narrow(192, in_features) * 0.0625), randn(290, in_features, seed=1)
    product = matrix.multiply(x)
    expected = NativeLayerKernels(library, torch.float32).silu_mul(product)
    for num_rows in NUM_ROWS:
        gated, wide = matrix.multiply_gated(x[:num_rows]), matrix.multiply_wide(x[:num_rows])
        assert gated is not None and torch.equal(gated, expected[:num_rows]), f"{num_rows} rows"
        assert wide is not None and torch.equal(wide, product[:num_rows]), f"{num_rows} rows"


@pytest.mark.parametrize("num_threads", [1, 3])
def test_the_number_of_threads_changes_no_bit(library, num_threads):
    weight, x = narrow(500, 1024), randn(40, 1024, seed=1)
    matrix = pack_dense(library, weight)
    expected, before = matrix.multiply(x), torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        assert torch.equal(matrix.multiply(x), expected)
        assert torch.equal(pack_dense(library, weight).packed, matrix.packed)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("at", [(0, 0), (99, 63), (50, 1)])
def test_one_weight_that_needs_more_bits_keeps_the_matrix_as_it_is(library, at):
    weight = narrow(100, 64)
    weight[at] = 1 + 2**-8  # half a unit in the last place too much
    matrix, x = pack_dense(library, weight), randn(3, 64, seed=1)
    assert matrix.packed.dtype is torch.float32
    torch.testing.assert_close(matrix.multiply(x), x @ weight.T, rtol=1e-5, atol=1e-4)
    assert pack_dense(library, narrow(4, 63)).packed.dtype is torch.float32, "pairs of inputs"


def test_every_bit_of_an_input_counts(library):
    """Each input alone, so the product is the input itself."""
    numbers = torch.tensor([1 / 3, -math.pi, 1 + 2**-23, -(2 - 2**-23), 3.4028235e38, -3.4028235e38, 1e-30, 0.0, -7.0])
    x = torch.diag(torch.cat((numbers, torch.zeros(23))))
    product = pack_dense(library, torch.ones(40, 32)).multiply(x)
    assert torch.equal(product, x.sum(dim=1, keepdim=True).expand(-1, 40))


def test_tiny_inputs_lose_at_most_the_smallest_number(library):
    """AMX takes what is smaller than 2^-126 as zero."""
    x = randn(20, 64) * 1e-37
    weight = narrow(40, 64, seed=1)
    product = pack_dense(library, weight).multiply(x)
    torch.testing.assert_close(product.double(), x.double() @ weight.double().T, rtol=1e-6, atol=64 * 4 * 2**-126)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_in_its_row(library, value):
    weight, x = narrow(70, 96), randn(20, 96, seed=1)
    weight[weight == 0] = 1
    matrix = pack_dense(library, weight)
    expected = matrix.multiply(x)
    x[2, 5] = value
    product = matrix.multiply(x)
    torch.testing.assert_close(product[2], value * weight[:, 5], equal_nan=True)
    others = [row for row in range(20) if row != 2]
    assert torch.equal(product[others], expected[others])
