"""Keys and values in 8 bits: the specification of the write, and what a reader gets back."""

import pytest
import torch

from workers.kernels.quantized_kv import KV_DTYPES, LIMITS, QuantizedKV, quantize, read, write

FORMS = pytest.mark.parametrize("dtype", KV_DTYPES.values(), ids=KV_DTYPES)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def new_cache(dtype, *, num_blocks=5, block_size=4, num_kv_heads=3, head_dim=8):
    values = torch.zeros(num_blocks, block_size, num_kv_heads, head_dim).to(dtype)
    return QuantizedKV(values, torch.zeros(num_blocks, num_kv_heads, block_size))


def test_the_worked_example():
    values, scales = quantize(torch.tensor([[[0.5, -1.0, 0.25]]]), torch.int8)
    assert values.tolist() == [[[64, -127, 32]]]
    assert scales.tolist() == [[pytest.approx(1 / 127)]]


def test_every_number_of_float8_is_kept():
    """Next to the largest one, which sets the scale to 1."""
    bits = torch.arange(256, dtype=torch.uint8)
    numbers = bits.view(torch.float8_e4m3fn).float()
    numbers = numbers[numbers.isfinite()]
    values, scales = quantize(numbers.view(1, 1, -1), torch.float8_e4m3fn)
    assert scales.item() == 1
    assert torch.equal(values.float().flatten(), numbers)


@FORMS
@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e30])
def test_numbers_of_any_size_keep_their_digits(dtype, size):
    x = randn(50, 2, 64) * size
    values, scales = quantize(x, dtype)
    error = (values.float() * scales[..., None] - x).abs() / x.abs().amax(-1, keepdim=True)
    # Half a step of 127; half a unit of 3 binary places, for numbers from 256 to 448.
    assert error.max() <= (0.5 / 127 if dtype == torch.int8 else 16 / 448) * 1.001


@FORMS
def test_zeros_and_what_vanishes_become_zeros(dtype):
    x = torch.tensor([[[0.0, -0.0]], [[1e-45, 0.0]]])
    values, scales = quantize(x, dtype)
    assert not (values.float() * scales[..., None]).any()


@FORMS
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_broken_number_is_not_hidden(dtype, bad):
    x = torch.tensor([[[1.0, bad, 2.0], [1.0, 2.0, 3.0]]])
    values, scales = quantize(x, dtype)
    found = values.float() * scales[..., None]
    assert found[0, 0].isnan().any()
    assert found[0, 1].isfinite().all(), "only its own head"


@FORMS
def test_what_is_written_is_read_and_never_changes(dtype):
    cache, x = new_cache(dtype), randn(6, 3, 8)
    slots = torch.tensor([9, 4, 17, 5, 6, 12])
    write(cache, x, slots)
    rows = (slots[:, None] * 3 + torch.arange(3)).flatten()
    before = read(cache, rows)
    limit = LIMITS[dtype]
    torch.testing.assert_close(before.view(6, 3, 8), x, rtol=0, atol=x.abs().max().item() * 16 / limit)
    # Neighbors in the same blocks, much larger.
    write(cache, 100 * randn(3, 3, 8, seed=1), torch.tensor([8, 7, 16]))
    assert torch.equal(read(cache, rows), before)
    others = [slot for slot in range(20) if slot not in (*slots.tolist(), 8, 7, 16)]
    assert not cache.values.view(torch.uint8).view(20, 3, 8)[others].any(), "nothing else is written"
