"""The product with one fixed tile: right, and a row has the same bits alone, among others and in any chunk."""

import pytest
import torch

from workers.kernels.layers import layer_specification as specification
from workers.kernels.layers.matmul import choose_tile, matmul

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@DTYPES
@pytest.mark.parametrize(
    ("num_rows", "out_features", "in_features"), [(0, 8, 8), (1, 40, 96), (67, 33, 300), (130, 96, 128)], ids=str
)
def test_equals_the_specification(dtype, num_rows, out_features, in_features):
    x = randn(num_rows, in_features + 8).to(dtype)[:, :in_features]  # rows further apart than they are long
    weight, bias = randn(out_features, in_features, seed=1).to(dtype), randn(out_features, seed=2).to(dtype)
    for b in (None, bias):
        out = matmul(x, weight, b)
        assert out.dtype == dtype and out.is_contiguous()
        tolerance = TOLERANCES[dtype]
        torch.testing.assert_close(out, specification.matmul(x, weight, b), rtol=tolerance, atol=10 * tolerance)


@DTYPES
def test_a_row_has_the_same_bits_alone_among_64_and_in_any_chunk(dtype):
    x, weight = randn(150, 320).to(dtype), randn(100, 320, seed=1).to(dtype)
    whole = matmul(x, weight)
    for start, end in [(0, 1), (149, 150), (77, 78), (40, 104), (0, 64), (64, 128), (1, 8), (128, 150), (13, 146)]:
        assert torch.equal(matmul(x[start:end], weight), whole[start:end]), f"rows {start} to {end}"


def test_many_tiles_of_rows_are_each_computed_once():
    """More tiles of rows than one group has, and a last group that is smaller: every output is written, and by the right program."""
    rows = choose_tile(64, torch.float16).rows
    x, weight = randn(rows * 11 + 1, 16).half(), randn(70, 16, seed=1).half()
    torch.testing.assert_close(matmul(x, weight), specification.matmul(x, weight), rtol=1e-3, atol=1e-2)


def test_the_tile_is_chosen_by_the_weight_alone():
    assert choose_tile(28_672, torch.bfloat16).outputs > choose_tile(4096, torch.bfloat16).outputs
    assert choose_tile(4096, torch.float32) == choose_tile(28_672, torch.float32)
