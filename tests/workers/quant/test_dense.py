"""Dense weights: the product, its bias and the packed layout, in which a row's result does not depend on the other rows."""

import pytest
import torch
from torch.nn.functional import linear as plain_linear

from workers.quant.dense import CAN_PACK, DENSE, DenseMethod, linear, pack


def weight(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def new_layer(w):
    layer = torch.nn.Module()
    DENSE.create(layer, *w.shape, weight_loader=lambda *_: 0, dtype=w.dtype, device="cpu")
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shards_fill_the_matrix_and_apply_multiplies_by_it(dtype):
    w, x, bias = weight(24, 16).to(dtype), weight(5, 16, seed=1).to(dtype), weight(24, seed=2).to(dtype)
    layer = new_layer(w)
    assert DENSE.load(layer, w[:8].float(), slice(0, 8)) == 8 * 16
    assert DENSE.load(layer, w[8:], slice(8, None)) == 16 * 16
    assert torch.equal(layer.weight, w)
    assert_multiplies(layer, x, w, bias)
    loaded = layer.weight
    DENSE.finish(layer)
    assert_multiplies(layer, x, w, bias)
    assert torch.equal(loaded, w), "finish changes nothing in place"


def assert_multiplies(layer, x, w, bias):
    torch.testing.assert_close(DENSE.apply(layer, x), plain_linear(x, w))
    torch.testing.assert_close(DENSE.apply(layer, x, bias), plain_linear(x, w, bias))
    torch.testing.assert_close(DENSE.apply(layer, x[:1], bias), plain_linear(x[:1], w, bias))


def test_the_parameter_carries_its_loader():
    layer = torch.nn.Module()
    DENSE.create(layer, 6, 4, weight_loader=lambda parameter, *_: parameter.numel(), dtype=torch.float32, device="cpu")
    assert dict(layer.named_parameters()).keys() == {"weight"}
    assert layer.weight.weight_loader(layer.weight, None, None) == 24


def test_the_product_can_be_another_one():
    layer, x = new_layer(weight(6, 4)), weight(2, 4, seed=1)
    seen = DenseMethod(lambda *operands: operands).apply(layer, x)
    assert seen[0] is x and seen[1] is layer.weight and seen[2] is None


@pytest.mark.skipif(not CAN_PACK, reason="this build of torch has no oneDNN")
@pytest.mark.parametrize(("out_features", "in_features"), [(64, 64), (48, 96), (512, 1024), (257, 2048)])
def test_packed_product_is_right_and_each_row_independent_of_the_batch(out_features, in_features):
    w, x = weight(out_features, in_features), weight(130, in_features, seed=1)
    packed = pack(torch.nn.Parameter(w, requires_grad=False))
    assert packed.is_mkldnn
    with torch.inference_mode():
        whole = linear(x, packed)
        torch.testing.assert_close(whole, plain_linear(x, w), rtol=1e-4, atol=1e-3)
        for num_rows in (0, 1, 2, 3, 4, 7, 8, 16, 33, 129):
            assert torch.equal(linear(x[:num_rows], packed), whole[:num_rows]), f"{num_rows} rows"
            assert torch.equal(linear(x[130 - num_rows :], packed), whole[130 - num_rows :]), f"last {num_rows} rows"
