"""Weights in groups that become bfloat16 for tiles of AMX: each has the value that it should, and products have the bits of dense weights
with these values.
"""

import math

import numpy as np
import pytest
import torch
from support.native import native_library

from workers.native.matrices import pack_dense, pack_grouped
from workers.quant.grouped import quantize_weight
from workers.quant.quantized import QuantizedTensor

GROUP = 32
# Around a tile of rows, a pair of tiles, a slice that several pairs pass, and more than one block of rows.
NUM_ROWS = (0, 1, 2, 9, 15, 16, 17, 32, 33, 64, 65, 515)


@pytest.fixture
def library():
    return native_library("amx")


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def parts(form, out_features, in_features, *, scale=0.01):
    """num_bits, values, scales, and minima or zero points."""
    generator = torch.Generator().manual_seed(1)
    num_bits, (lowest, end) = (
        (8, (-128, 128)) if form.startswith("int8") else (4, (-8, 8) if form in ("int4", "int4 wide") else (0, 16))
    )
    values = torch.randint(lowest, end, (out_features, in_features), generator=generator, dtype=torch.int8)
    dtype = torch.float32 if form.endswith("wide") else torch.float16
    scales, seconds = (random(out_features, in_features // GROUP, seed=i) * scale for i in (2, 3))
    if "zeros" in form:
        return num_bits, values, scales.to(dtype), torch.randint(0, 17, seconds.shape, generator=generator).to(dtype)
    return num_bits, values, scales.to(dtype), (seconds * 8).to(dtype) if "minima" in form else None


def packed(library, form, num_bits, values, scales, seconds):
    if "zeros" in form:
        return pack_grouped(library, values, scales, num_bits=num_bits, zero_points=seconds)
    return pack_grouped(library, values, scales, seconds, num_bits=num_bits)


def shift_for(form, num_bits, scales, seconds):
    """The power of two that brings the largest weight to at most 2^15, and at most 18."""
    scales, seconds = scales.float().abs(), None if seconds is None else seconds.float().abs()
    if "zeros" in form:
        largest = scales * seconds.clamp(min=15)
    else:
        largest = scales * (128 if num_bits == 8 else 16) + (0 if seconds is None else seconds)
    return min(15 - math.frexp(largest.max().item())[1], 18)


def expanded(form, num_bits, values, scales, seconds):
    """The specification: bfloat16 [out_features, in_features], multiplied by 2^(shift - 112)."""
    shift = shift_for(form, num_bits, scales, seconds)
    half = np.float16
    factor = 2.0 ** (shift - 3)
    v = values.numpy().astype(half) * half(8)
    s = (scales.double().numpy() * factor).astype(half).repeat(GROUP, axis=1)
    second = None if seconds is None else seconds.double().numpy().repeat(GROUP, axis=1)
    if "zeros" in form:
        w = (v - second.astype(half) * half(8)) * s
    elif second is None:
        w = v * s
    else:
        # A product and a sum that are rounded once.
        w = (v.astype(np.float64) * s + (second * factor).astype(half) * half(8)).astype(half)
    bits = w.view(np.uint16)
    bits = (bits & 0x8000) | (((bits & 0x7FFF) + 4) >> 3)
    return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16), shift


def in_the_order_of_tiles(x):
    """Of 4 columns, the second and the third change places."""
    return x.unflatten(1, (-1, 4))[..., [0, 2, 1, 3]].flatten(1).contiguous()


FORMS = [
    "int8",
    "int4",
    "int8 minima",
    "int4 minima",
    "int4 zeros",
    "int8 wide",
    "int4 wide",
    "int8 minima wide",
    "int4 minima wide",
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("out_features", "in_features"), [(70, 96), (64, 1088)])
def test_products_have_the_bits_of_dense_weights(library, form, out_features, in_features):
    weight = parts(form, out_features, in_features)
    matrix = packed(library, form, *weight)
    dense, shift = expanded(form, *weight)
    x = random(max(NUM_ROWS), in_features + 2, seed=4).to(torch.bfloat16)[:, 2:]
    reference = pack_dense(library, in_the_order_of_tiles(dense))
    expected = reference.multiply(in_the_order_of_tiles(x) * 2.0 ** (112 - shift))
    for num_rows in NUM_ROWS:
        assert torch.equal(matrix.multiply(x[:num_rows]), expected[:num_rows]), f"{num_rows} rows"
    assert torch.equal(matrix.multiply(x[7:16]), expected[7:16])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale", [1e-6, 0.01, 300.0])
def test_products_are_near_those_of_the_stored_weights(library, form, scale):
    num_bits, values, scales, seconds = parts(form, 40, 256, scale=scale)
    matrix = packed(library, form, num_bits, values, scales, seconds)
    minima = -seconds.float() * scales.float() if "zeros" in form else seconds
    exact = QuantizedTensor(values=values, scales=scales, minima=minima, num_bits=num_bits).dequantize()
    x = random(5, 256, seed=4).to(torch.bfloat16)
    expected = x.double() @ exact.double().T
    assert (matrix.multiply(x) - expected).norm() / expected.norm() < 0.005


@pytest.mark.parametrize("num_bits", [8, 4])
def test_zeros_stay_zeros(library, num_bits):
    w = random(40, 64)
    w[3] = 0
    w[:, :32] = 0
    matrix = pack_grouped(library, *quantize_weight(w, num_bits=num_bits), num_bits=num_bits)
    x = random(3, 64, seed=1).to(torch.bfloat16)
    product = matrix.multiply(x)
    assert (product[:, 3] == 0).all() and product[:, 4].abs().min() > 0
    x[:, :32] = 1e6
    assert torch.equal(matrix.multiply(x)[:, :3], product[:, :3])
    nothing = pack_grouped(library, *quantize_weight(w * 0, num_bits=num_bits), num_bits=num_bits)
    assert (nothing.multiply(product.new_ones(2, 64)) == 0).all()


def test_an_input_that_is_not_finite_spoils_its_row_alone(library):
    matrix = pack_grouped(library, *quantize_weight(random(40, 64), num_bits=8), num_bits=8)
    x = random(4, 64, seed=1).to(torch.bfloat16)
    expected = matrix.multiply(x)
    x[1, 3], x[2, 5] = torch.inf, torch.nan
    product = matrix.multiply(x)
    assert not product[1:3].isfinite().any()
    assert torch.equal(product[[0, 3]], expected[[0, 3]])


@pytest.mark.parametrize("bad", [torch.inf, torch.nan, 1e9])
def test_weights_that_half_precision_cannot_hold_are_not_numbers(library, bad):
    _, values, scales, _ = parts("int8 wide", 40, 64)
    scales[7, 1] = bad
    matrix = pack_grouped(library, values, scales, num_bits=8)
    assert matrix.multiply(random(2, 64).to(torch.bfloat16)).isnan().all()
