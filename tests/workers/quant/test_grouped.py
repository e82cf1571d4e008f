"""Weights in groups of 8 or 4 bits: how near they are, and that the compiled product has the bits of the specification."""

import pytest
import torch
from support.native import native_library

from workers.native.matrices import HEADER_BYTES, pack_grouped
from workers.quant.dense import DENSE
from workers.quant.grouped import GroupedMethod, multiply, quantize_inputs, quantize_weight
from workers.quant.quantized import QuantizedTensor

LIBRARIES = [None, "amx", "avx512", "avx2"]
# With tiles in bfloat16, inputs are not rounded: see tests/workers/native/test_expanded_weights.py.
ROUNDING = [
    (name, dtype)
    for name in ("amx", "avx512", "avx2")
    for dtype in (torch.float32, torch.bfloat16)
    if (name, dtype) != ("amx", torch.bfloat16)
]


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def new_layer(method, w):
    layer = torch.nn.Module()
    method.create(layer, *w.shape, weight_loader=lambda *_: 0, dtype=torch.float32, device="cpu")
    return layer


def test_a_worked_example():
    """8 bits: scale 2 / 127, so 2.0 is 127 and -1.0 is -64. 4 bits: the extreme 2.0 is -8, so the scale is -0.25 and -1.0 is 4."""
    w = torch.zeros(1, 32)
    w[0, :2] = torch.tensor([2.0, -1.0])
    values, scales = quantize_weight(w, num_bits=8)
    assert values[0, :3].tolist() == [127, -64, 0] and scales.item() == pytest.approx(2 / 127, rel=1e-3)
    values, scales = quantize_weight(w, num_bits=4)
    assert values[0, :3].tolist() == [-8, 4, 0] and scales.item() == -0.25


@pytest.mark.parametrize(("num_bits", "largest_error"), [(8, 0.51 / 127), (4, 1.01 / 8)])
def test_each_weight_is_near_its_value(num_bits, largest_error):
    w = random(50, 96)
    values, scales = quantize_weight(w, num_bits=num_bits)
    near = (values.unflatten(1, (-1, 32)) * scales[..., None].float()).flatten(1)
    extremes = w.unflatten(1, (-1, 32)).abs().amax(dim=2).repeat_interleave(32, dim=1)
    assert ((near - w).abs() <= extremes * largest_error).all()


def test_zeros_and_large_weights_stay_finite():
    w = torch.zeros(2, 64)
    w[1, :32] = 1e9
    for num_bits in (8, 4):
        values, scales = quantize_weight(w, num_bits=num_bits)
        assert (values[0] == 0).all() and scales.isfinite().all()


def test_inputs_are_rounded_in_groups_of_their_own():
    x = random(3, 64) * torch.tensor([1.0, 100.0]).repeat_interleave(32)
    whole, scales = quantize_inputs(x)
    assert whole.abs().amax(dim=2).eq(127).all()
    torch.testing.assert_close((whole * scales[..., None]).flatten(1), x, rtol=0, atol=0.51 * scales.max().item())


@pytest.mark.parametrize("num_bits", [8, 4])
@pytest.mark.parametrize(("name", "dtype"), ROUNDING)
def test_the_compiled_product_has_the_bits_of_the_specification(name, num_bits, dtype):
    library = native_library(name)
    for out_features, in_features in ((5, 32), (70, 96), (64, 1024)):
        w, x = random(out_features, in_features), random(23, in_features, dtype=dtype, seed=1)
        x[3] = 0
        method = GroupedMethod(num_bits, library=library, tied=DENSE)
        layer = new_layer(method, w)
        method.load(layer, w, slice(None))
        method.finish(layer)
        expected = multiply(x, *quantize_weight(w, num_bits=num_bits))
        for rows in (slice(0, 23), slice(0, 1), slice(4, 9), slice(6, 23), slice(0, 0)):
            assert torch.equal(method.apply(layer, x[rows]), expected[rows]), f"{out_features} x {in_features}, {rows}"


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("has_minima", [False, True])
@pytest.mark.parametrize("num_bits", [8, 4])
@pytest.mark.parametrize(("name", "dtype"), ROUNDING)
def test_every_stored_form_has_the_bits_of_the_specification_too(name, num_bits, has_minima, scale_dtype, dtype):
    generator = torch.Generator().manual_seed(0)
    lowest, end = (-128, 128) if num_bits == 8 else (0, 16) if has_minima else (-8, 8)
    values = torch.randint(lowest, end, (70, 96), generator=generator, dtype=torch.int8)
    # A third is exact in neither type.
    scales = (random(70, 3) / 3).to(scale_dtype)
    minima = (random(70, 3, seed=1) / 3).to(scale_dtype) if has_minima else None
    x = random(23, 96, dtype=dtype, seed=2)
    matrix = pack_grouped(native_library(name), values, scales, minima, num_bits=num_bits)
    num_bytes = 32 * num_bits // 8 + scales.element_size() * (2 if has_minima else 1)
    assert matrix.packed.nbytes == HEADER_BYTES + 96 * 3 * num_bytes, "3 groups of 96 rows, which fill the panels"
    expected = multiply(x, values, scales, minima)
    assert torch.equal(matrix.multiply(x), expected)
    assert torch.equal(matrix.multiply(x[4:5]), expected[4:5])
    weight = QuantizedTensor(values=values, scales=scales, minima=minima, num_bits=num_bits).dequantize()
    exact = x.float() @ weight.T
    assert (expected.float() - exact).norm() / exact.norm() < 0.02


@pytest.mark.parametrize(("name", "dtype"), [*ROUNDING, ("avx2", torch.float16)])
def test_zero_points_have_the_bits_of_values_less_these(name, dtype):
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, 16, (70, 96), generator=generator, dtype=torch.int8)
    zeros = torch.randint(0, 17, (70, 3), generator=generator)
    scales, x = (random(70, 3) / 3).half(), random(40, 96, dtype=dtype, seed=2)
    matrix = pack_grouped(native_library(name), values, scales, num_bits=4, zero_points=zeros.half())
    assert matrix.packed.nbytes == HEADER_BYTES + 96 * 3 * 20
    less = (values - zeros.repeat_interleave(32, dim=1)).to(torch.int8)
    expected = multiply(x, less, scales)
    assert torch.equal(multiply(x, values, scales, zero_points=zeros.half()), expected)
    for rows in (slice(0, 40), slice(3, 4), slice(5, 12)):
        assert torch.equal(matrix.multiply(x[rows]), expected[rows])


@pytest.mark.parametrize("num_bits", [8, 4])
@pytest.mark.parametrize("name", LIBRARIES)
def test_shards_fill_the_matrix_and_the_product_is_near_the_exact_one(name, num_bits):
    method = GroupedMethod(num_bits, library=name and native_library(name), tied=DENSE)
    w, x, bias = random(48, 128), random(4, 128, seed=1), random(48, seed=2)
    layer = new_layer(method, w)
    assert (
        method.load(layer, w[:16], slice(0, 16)) + method.load(layer, w[16:], slice(16, None)) == layer.weight.numel()
    )
    before = method.apply(layer, x, bias)
    method.finish(layer)
    assert torch.equal(method.apply(layer, x, bias), before), "packing changes no bit"
    exact = x @ w.T + bias
    assert (before - exact).norm() / exact.norm() < (0.02 if num_bits == 8 else 0.15)


def test_the_weights_take_34_or_18_bytes_for_32():
    w = random(64, 256)
    for num_bits, num_bytes in ((8, 34), (4, 18)):
        method = GroupedMethod(num_bits, library=native_library("avx2"), tied=DENSE)
        layer = new_layer(method, w)
        method.load(layer, w, slice(None))
        assert layer.weight.nbytes + layer.scales.nbytes == w.numel() // 32 * num_bytes
        method.finish(layer)
        packed_bytes = sum(tensor.nbytes for tensor in layer.state_dict().values())
        assert packed_bytes == HEADER_BYTES + w.numel() // 32 * num_bytes


@pytest.mark.parametrize("name", LIBRARIES)
def test_an_input_that_is_not_finite_spoils_its_row_alone(name):
    method = GroupedMethod(8, library=name and native_library(name), tied=DENSE)
    w, x = random(40, 64), random(4, 64, seed=1)
    layer = new_layer(method, w)
    method.load(layer, w, slice(None))
    method.finish(layer)
    expected = method.apply(layer, x)
    x[1, 3], x[2, 5] = torch.inf, torch.nan
    product = method.apply(layer, x)
    assert not product[1:3].isfinite().any()
    assert torch.equal(product[[0, 3]], expected[[0, 3]])


def test_a_tied_head_keeps_the_form_of_the_embedding():
    method = GroupedMethod(4, library=None, tied=DENSE)
    head, x = torch.nn.Module(), random(3, 48, seed=1)
    head.weight = torch.nn.Parameter(random(20, 48), requires_grad=False)
    expected = x @ head.weight.T
    method.finish(head)
    torch.testing.assert_close(method.apply(head, x), expected)
