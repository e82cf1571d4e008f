"""Products that end in what follows them: the bits are those of one kernel after the other, for every form of weights."""

import pytest
import torch
from support.native import native_library

from workers.kernels.layers import layer_specification as specification
from workers.kernels.layers.native_layers import NativeLayerKernels
from workers.native.matrices import pack_dense, pack_float8, pack_grouped

# Around a tile of rows, a pair of tiles, the rows that a product takes at once, and more than one block of them.
NUM_ROWS = (0, 1, 9, 12, 13, 17, 33, 64, 65, 515)


@pytest.fixture(params=["amx", "avx512", "avx2"])
def library(request):
    return native_library(request.param)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def packed(library, form, dtype, *, out_features, in_features):
    weight = randn(out_features, in_features) * in_features**-0.5
    if form == "dense":
        return pack_dense(library, weight.to(dtype))
    values = (weight * 40).round().clamp(-8, 7).to(torch.int8)
    scales = torch.full((out_features, in_features // 32), 0.02, dtype=torch.float16)
    return pack_grouped(library, values, scales, num_bits=8 if form == "int8" else 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("form", "in_features"), [("dense", 130), ("dense", 1088), ("int8", 96), ("int4", 96)], ids=str
)
def test_a_fused_product_has_the_bits_of_its_parts(library, form, in_features, dtype):
    matrix = packed(library, form, dtype, out_features=192, in_features=in_features)
    x = (randn(max(NUM_ROWS), in_features + 6, seed=1) * 2).to(dtype)[:, 6:]
    product = matrix.multiply(x)
    expected = NativeLayerKernels(library, dtype).silu_mul(product)
    for num_rows in NUM_ROWS:
        gated = matrix.multiply_gated(x[:num_rows])
        assert gated is not None and gated.shape == (num_rows, 96)
        assert torch.equal(gated, expected[:num_rows]), f"{num_rows} rows"
        wide = matrix.multiply_wide(x[:num_rows])
        assert wide is not None and wide.dtype == torch.float32
        assert torch.equal(wide, product[:num_rows].float()), f"{num_rows} rows"


def test_wide_products_go_where_they_are_wanted(library):
    matrix = packed(library, "dense", torch.bfloat16, out_features=70, in_features=64)
    x, out = randn(5, 64, seed=1).to(torch.bfloat16), torch.full((5, 80), torch.nan)
    assert matrix.multiply_wide(x, out[:, 4:74]) is not None
    assert torch.equal(out[:, 4:74], matrix.multiply(x).float())
    assert out[:, :4].isnan().all() and out[:, 74:].isnan().all()


def test_gates_that_share_a_panel_with_ups_are_left_to_two_kernels(library):
    matrix = packed(library, "dense", torch.float32, out_features=96, in_features=64)
    assert matrix.multiply_gated(randn(3, 64)) is None
    float8 = pack_float8(library, randn(64, 64).to(torch.float8_e4m3fn), torch.ones(64, 1), block_size=64)
    assert float8.multiply_gated(randn(3, 64)) is None and float8.multiply_wide(randn(3, 64)) is None


def test_silu_of_every_bfloat16_is_as_good_as_exact(library):
    gates = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    gates = gates[gates.isfinite() & (gates > -80)]
    ones = torch.ones_like(gates)
    silu = NativeLayerKernels(library, torch.bfloat16).silu_mul(torch.cat((gates, ones)).view(1, -1))[0]
    exact = gates.double() * torch.sigmoid(gates.double())
    # Half a unit in the last place of 8 bits; below 2^-126 there is only zero.
    torch.testing.assert_close(silu.double(), exact, rtol=2**-8, atol=2**-126)
    assert (silu == exact.to(torch.bfloat16)).double().mean() > 0.98
    assert torch.equal(silu, silu_of(native_library("avx2"), gates)), "other bits than on AVX2"


def silu_of(library, gates):
    both = torch.cat((gates, torch.ones_like(gates))).view(1, -1)
    return NativeLayerKernels(library, torch.bfloat16).silu_mul(both)[0]


def test_silu_keeps_what_is_not_a_number(library):
    gates = torch.tensor([torch.nan, 1.0, torch.inf, -200.0]).to(torch.bfloat16)
    silu = silu_of(library, gates)
    assert silu[0].isnan() and silu[2] == torch.inf and -1e-30 < silu[3] <= 0
    assert silu[1] == specification.silu(gates[1].float()).to(torch.bfloat16)
