"""Products of 8-bit floats: right for every number of the type, rows that do not depend on each other, the same bits everywhere."""

import pytest
import torch
from support.native import native_library

from workers.native.matrices import pack_float8, packs_float8
from workers.quant.pack_cpu import cpu_pack
from workers.quant.quantized import Float8Tensor

CPU = torch.device("cpu")


@pytest.fixture(params=["amx", "avx512", "avx2"])
def library(request):
    return native_library(request.param)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stored(out_features, in_features, *, block_size=None):
    values = (random(out_features, in_features) * 40).to(torch.float8_e4m3fn)
    num_blocks = 1 if block_size is None else -(-in_features // block_size)
    scales = random(out_features, num_blocks, seed=1).abs() / 100
    return Float8Tensor(values=values, scales=scales, block_size=block_size or in_features)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_number_of_the_type(library, dtype):
    """A matrix whose column 0 has all of them, by an input of 1."""
    bits = torch.tensor([b for b in range(256) if b & 127 != 127], dtype=torch.uint8)
    values = torch.zeros((len(bits), 64), dtype=torch.float8_e4m3fn)
    values[:, 1] = bits.view(torch.float8_e4m3fn)
    matrix = pack_float8(library, values, torch.ones(len(bits), 1), block_size=64)
    x = torch.zeros(3, 64, dtype=dtype)
    x[1, 1] = 1
    expected = bits.view(torch.float8_e4m3fn).to(dtype)
    assert torch.equal(matrix.multiply(x)[1], expected) and not matrix.multiply(x)[[0, 2]].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "block_size"),
    [((7, 2), None), ((33, 96), 32), ((64, 1024), 128), ((40, 330), 128), ((257, 130), None), ((33, 96), 6)],
)
def test_the_product_is_right_and_each_row_independent_of_the_others(library, dtype, shape, block_size):
    weight, x = stored(*shape, block_size=block_size), random(61, shape[1], seed=2).to(dtype)
    matrix = cpu_pack(library)(weight, dtype, CPU)
    whole = matrix.multiply(x)
    exact = x.double() @ weight.dequantize().double().T
    tolerance = 2**-7 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(whole.double(), exact, rtol=tolerance, atol=tolerance * exact.abs().max().item())
    for num_rows in (0, 1, 2, 5, 6, 7, 12, 13, 24, 60):
        assert torch.equal(matrix.multiply(x[:num_rows]), whole[:num_rows]), f"{num_rows} rows"
        assert torch.equal(matrix.multiply(x[61 - num_rows :]), whole[61 - num_rows :]), f"last {num_rows} rows"
    assert torch.equal(matrix.multiply(x.repeat(1, 2)[:, : shape[1]]), whole), "rows of another stride"


def test_float32_has_the_same_bits_on_every_instruction_set():
    weight, x = stored(100, 320, block_size=64), random(17, 320, seed=2)
    products = [cpu_pack(native_library(name))(weight, torch.float32, CPU).multiply(x) for name in ("avx512", "avx2")]
    assert torch.equal(*products)


def test_a_weight_takes_8_bits(library):
    (packed,) = cpu_pack(library)(stored(64, 1024), torch.float32, CPU).tensors
    assert packed.nbytes == 64 + 64 * (1024 + 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_compiled_kernels_it_stays_in_8_bits_too(dtype):
    weight, x = stored(48, 96, block_size=32), random(13, 96, seed=2).to(dtype)
    matrix = cpu_pack(None)(weight, dtype, CPU)
    whole = matrix.multiply(x)
    assert sum(t.nbytes for t in matrix.tensors) == 48 * (96 + 3 * 4)
    exact = x.double() @ weight.dequantize().double().T
    torch.testing.assert_close(whole, exact.to(dtype), rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-4)
    assert all(torch.equal(matrix.multiply(x[:n]), whole[:n]) for n in (1, 2, 7))


def test_an_odd_number_of_inputs_becomes_dense():
    assert not packs_float8(3, block_size=3) and not packs_float8(9, block_size=4)
    matrix = cpu_pack(None)(stored(4, 3), torch.float32, CPU)
    assert matrix.is_dense


def test_a_static_scale_of_inputs_is_kept_in_mind():
    from dataclasses import replace

    from workers.quant.stored import join

    a, b = stored(8, 32), stored(4, 32)
    one, other = torch.tensor(0.5), torch.tensor(0.25)
    assert len(join([replace(a, input_scale=one), replace(b, input_scale=one.clone())])) == 1
    assert len(join([replace(a, input_scale=one), replace(b, input_scale=other)])) == 2
    assert cpu_pack(None)(replace(a, input_scale=one), torch.float32, CPU).rounds_statically is False
