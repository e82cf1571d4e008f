"""The attention kernels against the sdpa backend, and the bits of a query: alone, among others, chunked, wherever its blocks are."""

from itertools import pairwise

import pytest
import torch
from support.attention_batches import fill_cache, make_metadata

from workers.attention import triton_paged
from workers.attention.sdpa import SdpaBackend
from workers.attention.triton_paged import TritonBackend
from workers.kernels.quantized_kv import KV_DTYPES, QuantizedKV

TOLERANCES = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
# Decodes, prefills, and chunks between, of 1 to 4 segments of 64 keys; 5 tokens are more than a short tile holds, 3 are not.
PARTS = [(0, 1), (200, 1), (0, 37), (90, 21), (63, 1), (129, 3), (0, 0), (190, 5)]


@pytest.fixture(autouse=True)
def _short_segments(monkeypatch):
    """A context of several segments takes the interpreter seconds with the real length."""
    monkeypatch.setattr(triton_paged, "SEGMENT", 64)


def randn(*shape, dtype, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Model:
    """Queries, keys and values of a few sequences, and both backends."""

    def __init__(self, num_heads, num_kv_heads, head_dim, *, window, dtype, kv="auto", num_sequences=3, length=210):
        shape = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
        self.window, self.kv = window, kv
        self.kernel = TritonBackend(sliding_window=window, **shape)
        self.specification = SdpaBackend(sliding_window=window, **shape)
        heads = (num_heads, num_kv_heads, num_kv_heads)
        self.q, self.k, self.v = (
            [randn(length, n, head_dim, dtype=dtype, seed=10 * i + j) for i in range(num_sequences)]
            for j, n in enumerate(heads)
        )

    def batch(self, parts, block_size, *, seed=0, max_seq_len=0, hole=torch.nan):
        """parts: (sequence, before, new). Returns q, both caches and the metadata."""
        generator = torch.Generator().manual_seed(seed)
        metadata = make_metadata([p[1:] for p in parts], block_size, generator=generator, max_seq_len=max_seq_len)
        caches = [
            fill_cache([kv[i] for i, *_ in parts], metadata, block_size, sliding_window=self.window).nan_to_num(hole)
            for kv in (self.k, self.v)
        ]
        if self.kv != "auto":
            caches = [QuantizedKV.of(cache, KV_DTYPES[self.kv]) for cache in caches]
        q = torch.cat([self.q[i][before : before + new] for i, before, new in parts])
        # Heads of a longer row, as the layer's projection gives them.
        wide = torch.full((q.shape[0], q.shape[1] + 3, q.shape[2]), torch.nan, dtype=q.dtype)
        wide[:, : q.shape[1]] = q
        return wide[:, : q.shape[1]], *caches, metadata

    def attend(self, parts, block_size, **kwargs):
        """The kernel's results, one tensor for each part."""
        out = self.kernel.forward(*self.batch(parts, block_size, **kwargs))
        return out.split([n for *_, n in parts])


# Pairs of all values with each other where they could interact, not their product.
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "window", "block_size", "dtype"),
    [
        (2, 2, 64, None, 16, torch.bfloat16),
        (4, 1, 128, None, 256, torch.float16),
        (8, 1, 64, 100, 16, torch.float32),
        (4, 1, 80, 100, 256, torch.bfloat16),
        (8, 1, 128, 1, 16, torch.float16),
        (1, 1, 80, 1, 256, torch.float32),
        (4, 1, 64, 4096, 16, torch.float16),
        (6, 2, 24, 33, 5, torch.float32),
        (2, 1, 256, 100, 16, torch.bfloat16),
    ],
)
def test_equals_the_specification(num_heads, num_kv_heads, head_dim, window, block_size, dtype):
    model = Model(num_heads, num_kv_heads, head_dim, window=window, dtype=dtype, num_sequences=len(PARTS))
    parts = [(i, *part) for i, part in enumerate(PARTS)]
    out = model.kernel.forward(*model.batch(parts, block_size))
    # The specification reads unused slots, which the engine fills with zeros, and multiplies them by 0.
    q, k_cache, v_cache, metadata = model.batch(parts, block_size, hole=0.0)
    expected = model.specification.forward(q.float(), k_cache.float(), v_cache.float(), metadata)
    torch.testing.assert_close(out.float(), expected, atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype])


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "window", "block_size", "dtype", "kv"),
    [
        (4, 1, 64, None, 16, torch.bfloat16, "int8"),
        (2, 1, 128, 100, 256, torch.float16, "int8"),
        (6, 2, 24, 33, 5, torch.float32, "int8"),
        (4, 2, 32, 100, 16, torch.float16, "fp8"),
        (6, 2, 24, None, 5, torch.float32, "fp8"),
        (8, 1, 64, 33, 16, torch.bfloat16, "fp8"),
    ],
)
def test_keys_and_values_in_8_bits_equal_the_specification(
    num_heads, num_kv_heads, head_dim, window, block_size, dtype, kv
):
    parts = [(0, 200, 1), (1, 90, 21), (2, 129, 3), (3, 0, 5)]
    model = Model(num_heads, num_kv_heads, head_dim, window=window, dtype=dtype, kv=kv, num_sequences=4)
    out = model.kernel.forward(*model.batch(parts, block_size))
    q, *caches, metadata = model.batch(parts, block_size, hole=0.0)
    assert all(cache.values.dtype.itemsize == 1 for cache in caches)
    expected = model.specification.forward(q.float(), *(cache.dequantize() for cache in caches), metadata)
    torch.testing.assert_close(out.float(), expected, atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype])


@pytest.mark.parametrize(("kv", "window"), [("int8", None), ("fp8", 40)])
def test_in_8_bits_a_query_has_the_same_bits_too(kv, window):
    model = Model(4, 2, 32, window=window, dtype=torch.bfloat16, kv=kv, num_sequences=2, length=100)
    whole = [model.attend([(i, 0, 100)], 16)[0] for i in range(2)]
    for block_size, parts in ((256, [(0, 0, 70)]), (4, [(1, 60, 3), (0, 99, 1)])):
        for (i, before, new), out in zip(parts, model.attend(parts, block_size), strict=True):
            assert torch.equal(out, whole[i][before : before + new]), f"{new} queries after {before} of {parts}"


@pytest.mark.parametrize(("window", "dtype"), [(None, torch.bfloat16), (70, torch.float16)], ids=str)
def test_a_query_has_the_same_bits_whatever_else_is_computed(window, dtype, monkeypatch):
    monkeypatch.setattr(triton_paged, "MERGED_ROWS", 64)  # fewer programs to interpret
    model = Model(4, 1, 32, window=window, dtype=dtype, num_sequences=3, length=200)
    whole = [model.attend([(i, 0, 200)], 16)[0] for i in range(3)]

    def check(parts, block_size, **kwargs):
        for (i, before, new), out in zip(parts, model.attend(parts, block_size, **kwargs), strict=True):
            assert torch.equal(out, whole[i][before : before + new]), f"{new} queries after {before} of {parts}"

    for cuts in ([0, 64, 65, 69, 200], [0, 1, 3, 130, 199, 200]):
        for start, end in pairwise(cuts):
            check([(0, start, end - start)], 256, seed=start)
    check([(0, 199, 1), (1, 20, 50), (2, 127, 1)], 16, seed=1)
    check([(1, 0, 66), (2, 128, 2), (0, 190, 6)], 4, seed=2)
    # Padded, and with the bounds of a captured graph.
    check([(2, 150, 1), (0, 0, 0), (1, 63, 1), (0, 0, 0)], 16, seed=3, max_seq_len=640)


@pytest.mark.parametrize("window", [None, 70])
def test_splitting_a_context_changes_no_bit(window, monkeypatch):
    model = Model(4, 2, 32, window=window, dtype=torch.bfloat16, num_sequences=4, length=200)
    parts = [(0, 199, 1), (1, 20, 50), (2, 63, 1), (3, 140, 7)]
    split = model.attend(parts, 16)
    monkeypatch.setattr(triton_paged, "MAX_PARTIAL_BYTES", 0)
    together = model.attend(parts, 16)
    assert all(torch.equal(a, b) for a, b in zip(split, together, strict=True))


def test_a_padded_sequence_without_keys_gives_zeros():
    model = Model(4, 1, 32, window=None, dtype=torch.float16, num_sequences=2)
    q, k_cache, v_cache, metadata = model.batch([(0, 9, 1), (1, 0, 1)], 16)
    metadata.seq_lens[1] = 0
    assert not model.kernel.forward(q, k_cache, v_cache, metadata)[1].any()
