"""The fused kernels of a layer against their specifications: every dtype, odd sizes, rows with a longer stride."""

import pytest
import torch
from support.native import native_library

from workers.kernels.layers import layer_specification as specification
from workers.kernels.layers.layer_kernels import TritonLayerKernels
from workers.kernels.layers.native_layers import NativeLayerKernels
from workers.kernels.quantized_kv import KV_DTYPES, QuantizedKV

# The kernels round where the specifications do; what differs is the order of a sum in fp32, and an exponential's last bit.
# So a result in half precision is the same number, or rarely its neighbor (of a product of rounded numbers, the next one).
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)


@pytest.fixture(params=["triton", "amx", "avx512", "avx2"])
def kernels(request):
    """A function: dtype -> the kernels under test."""
    if request.param == "triton":
        return lambda dtype: TritonLayerKernels()
    library = native_library(request.param)

    def native(dtype):
        if dtype == torch.float16:
            pytest.skip("the compiled kernels know float32 and bfloat16")
        return NativeLayerKernels(library, dtype)

    return native


def randn(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def strided(x, extra=24):
    """The same values, as a view whose rows are further apart, with garbage in between."""
    wide = torch.full((x.shape[0], x.shape[1] + extra), torch.nan, dtype=x.dtype)
    wide[:, : x.shape[1]] = x
    return wide[:, : x.shape[1]]


def assert_equal_but_for_rounding(actual, expected, *, most_unequal=0.02):
    tolerance = TOLERANCES[expected.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=1e-5)
    if expected.dtype != torch.float32:
        share = (actual != expected).float().mean().item()
        assert share <= most_unequal, f"{share:.1%} of the results differ: the kernel rounds elsewhere"


@DTYPES
@pytest.mark.parametrize("hidden_size", [64, 130, 514])
@pytest.mark.parametrize("has_residual", [False, True])
def test_add_rms_norm(kernels, dtype, hidden_size, has_residual):
    add_rms_norm = kernels(dtype).add_rms_norm
    # Values whose squares overflow or vanish in half precision.
    scales = torch.tensor([1.0, 300.0, 1e-3, 40.0, 0.0]).unsqueeze(1)
    x = strided((randn(5, hidden_size) * scales).to(dtype))
    residual = strided((randn(5, hidden_size, seed=1) * scales).to(dtype)) if has_residual else None
    weight = (torch.rand(hidden_size, generator=torch.Generator().manual_seed(2)) + 0.5).to(dtype)
    normed, total = add_rms_norm(x, residual, weight=weight, eps=1e-5)
    expected_normed, expected_total = specification.add_rms_norm(x, residual, weight=weight, eps=1e-5)
    assert torch.equal(total, expected_total), "the sum is rounded before the norm"
    assert normed.is_contiguous() and normed.dtype == dtype
    assert_equal_but_for_rounding(normed, expected_normed)
    alone, _ = add_rms_norm(x[3:4], None if residual is None else residual[3:4], weight=weight, eps=1e-5)
    assert torch.equal(alone, normed[3:4]), "a row depends on the others"


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # of the interpreter; the sigmoid is then 0
@DTYPES
@pytest.mark.parametrize("size", [48, 1027, 1792])
def test_silu_mul(kernels, dtype, size):
    silu_mul = kernels(dtype).silu_mul
    gate_up = strided(randn(3, 2 * size, scale=4.0).to(dtype))
    gate_up[0, :3] = torch.tensor([100.0, -100.0, 0.0])
    out = silu_mul(gate_up)
    assert out.shape == (3, size) and out.dtype == dtype
    assert_equal_but_for_rounding(out, specification.silu_mul(gate_up))
    assert torch.equal(silu_mul(gate_up[1:2]), out[1:2]), "a row depends on the others"


@DTYPES
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim"), [(8, 4, 8), (8, 1, 64), (3, 3, 10), (14, 2, 96)], ids=str
)
def test_rotary_kv(kernels, dtype, num_heads, num_kv_heads, head_dim):
    rotary_kv = kernels(dtype).rotary_kv
    num_tokens, block_size, num_blocks = 5, 4, 6
    num_rows = num_heads + 2 * num_kv_heads
    qkv = strided(randn(num_tokens, num_rows * head_dim).to(dtype)).unflatten(1, (num_rows, head_dim))
    cos_sin = randn(num_tokens, 2, head_dim, seed=1)
    half = head_dim // 2
    cos_sin[..., :half] = cos_sin[..., half:]
    cos_sin[:, 1, :half].neg_()
    angles = cos_sin.split(1, dim=1)
    # Any order, two blocks, and the null block's slot 0 for a padded row.
    slot_mapping = torch.tensor([9, 8, 23, 0, 11])
    caches, expected_caches = (
        tuple(torch.full((num_blocks, block_size, num_kv_heads, head_dim), 7.0, dtype=dtype) for _ in "kv")
        for _ in range(2)
    )
    q = rotary_kv(qkv, angles, kv_cache=caches, slot_mapping=slot_mapping)
    expected_q = specification.rotary_kv(qkv, angles, kv_cache=expected_caches, slot_mapping=slot_mapping)
    assert q.shape == (num_tokens, num_heads, head_dim) and q.is_contiguous()
    assert_equal_but_for_rounding(q, expected_q)
    assert_equal_but_for_rounding(caches[0], expected_caches[0])
    assert torch.equal(caches[1], expected_caches[1]), "values are written as they are, and nothing else is written"
    rotary_kv(qkv[1:2], [a[1:2] for a in angles], kv_cache=expected_caches, slot_mapping=slot_mapping[1:2])
    assert torch.equal(expected_caches[0][2, 0], caches[0][2, 0]), "a token depends on the others"


@DTYPES
@pytest.mark.parametrize("form", KV_DTYPES)
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(8, 4, 8), (3, 3, 10), (14, 2, 96)], ids=str)
def test_rotary_kv_in_8_bits(kernels, dtype, form, num_heads, num_kv_heads, head_dim):
    rotary_kv = kernels(dtype).rotary_kv
    num_tokens, block_size, num_blocks = 6, 4, 6
    # Of all sizes, and nothing at all.
    sizes = torch.tensor([1.0, 300.0, 1e-3, 0.0, 2e-6, 40.0]).view(-1, 1, 1)
    qkv = (randn(num_tokens, num_heads + 2 * num_kv_heads, head_dim) * sizes).to(dtype)
    # Turned by a right angle or not at all, so that no key is rounded before it is written.
    turns = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0, 0.0]).view(-1, 1, 1).expand(-1, 1, head_dim)
    signs = torch.ones(head_dim).index_fill(0, torch.arange(head_dim // 2), -1.0)
    angles = (1 - turns, turns * signs)
    slot_mapping = torch.tensor([9, 8, 23, 0, 11, 3])

    def new_caches():
        shape = (num_blocks, block_size, num_kv_heads, head_dim)
        return tuple(
            QuantizedKV(torch.ones(shape).to(KV_DTYPES[form]), torch.full((num_blocks, num_kv_heads, block_size), 7.0))
            for _ in "kv"
        )

    caches, expected_caches, alone = new_caches(), new_caches(), new_caches()
    rotary_kv(qkv, angles, kv_cache=caches, slot_mapping=slot_mapping)
    specification.rotary_kv(qkv, angles, kv_cache=expected_caches, slot_mapping=slot_mapping)
    rotary_kv(qkv[1:2], [a[1:2] for a in angles], kv_cache=alone, slot_mapping=slot_mapping[1:2])
    for cache, expected, one in zip(caches, expected_caches, alone, strict=True):
        assert torch.equal(cache.values.view(torch.uint8), expected.values.view(torch.uint8))
        assert torch.equal(cache.scales, expected.scales), "as specified, and nothing else is written"
        assert torch.equal(one.values.view(torch.uint8)[2, 0], cache.values.view(torch.uint8)[2, 0])
        assert torch.equal(one.scales[2, :, 0], cache.scales[2, :, 0]), "a token depends on the others"


def test_rotary_kv_worked_example(kernels):
    """Head_dim 4 turns the pairs (0, 2) and (1, 3): [1, 0, 0, 0] becomes [cos a, 0, sin a, 0]."""
    angle = torch.tensor([0.5, 0.25])
    cos, sin = angle.cos(), angle.sin()
    angles = (torch.cat((cos, cos)).view(1, 1, 4), torch.cat((-sin, sin)).view(1, 1, 4))
    kv_cache = torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 1, 4)
    x = torch.tensor([1.0, 0.0, 0.0, 0.0]).expand(1, 3, 4)
    for operation in (kernels(torch.float32).rotary_kv, specification.rotary_kv):
        q = operation(x, angles, kv_cache=kv_cache, slot_mapping=torch.tensor([1]))
        torch.testing.assert_close(q.flatten(), torch.stack([cos[0], 0 * cos[0], sin[0], 0 * cos[0]]))
        assert torch.equal(kv_cache[0][0, 1], q[0]) and torch.equal(kv_cache[1][0, 1, 0], x[0, 2])
