"""The compiled attention: equal to the specification but for rounding, and exact whatever else is computed."""

import random

import pytest
import torch
from support.attention_batches import fill_cache, make_metadata
from support.native import native_library

from workers.attention.native import NativeBackend
from workers.attention.sdpa import SdpaBackend
from workers.attention.select import native_obstacle
from workers.kernels.quantized_kv import KV_DTYPES, QuantizedKV

# Each shape with some of the windows, each window with some of the shapes.
SHAPES_AND_WINDOWS = [
    ((2, 2, 8), None),
    ((2, 2, 8), 5),
    ((4, 2, 32), 1),
    ((4, 2, 32), 100),
    ((3, 1, 128), None),
    ((3, 1, 128), 5),
    ((3, 1, 128), 100),
    ((8, 2, 80), None),
    ((8, 2, 80), 1),
    ((8, 2, 80), 100),
]
PARTS = [(0, 1), (0, 13), (9, 1), (199, 1), (67, 60), (64, 64), (130, 33)]


@pytest.fixture(params=["amx", "avx512", "avx2"])
def library(request):
    return native_library(request.param)


def make_sequences(shape, *, num_tokens, dtype, num=3):
    """Queries, keys and values [num_tokens, heads, head_dim] of each sequence."""
    num_heads, num_kv_heads, head_dim = shape
    generator = torch.Generator().manual_seed(0)
    return [
        tuple(
            torch.randn(num_tokens, n, head_dim, generator=generator).to(dtype)
            for n in (num_heads, num_kv_heads, num_kv_heads)
        )
        for _ in range(num)
    ]


def attend(backend, sequences, parts, *, block_size, window, kv="auto", generator=None):
    """parts: (tokens computed before, new tokens) of each sequence. Nothing but what a query sees is a number."""
    metadata = make_metadata(parts, block_size, generator=generator)
    caches = [
        fill_cache([sequence[i] for sequence in sequences], metadata, block_size, sliding_window=window) for i in (1, 2)
    ]
    if kv != "auto":
        caches = [QuantizedKV.of(cache, KV_DTYPES[kv]) for cache in caches]
    q = torch.cat(
        [sequence[0][before : before + new] for sequence, (before, new) in zip(sequences, parts, strict=True)]
    )
    return backend.forward(q, *caches, metadata).split([new for _, new in parts])


def make_backends(library, shape, *, dtype, window):
    sizes = {"num_heads": shape[0], "num_kv_heads": shape[1], "head_dim": shape[2], "sliding_window": window}
    return NativeBackend(library, dtype=dtype, **sizes), SdpaBackend(**sizes)


# Of the model, and of the KV cache.
FORMS = pytest.mark.parametrize(
    ("dtype", "kv"),
    [
        (torch.float32, "auto"),
        (torch.bfloat16, "auto"),
        (torch.float32, "int8"),
        (torch.bfloat16, "int8"),
        (torch.float32, "fp8"),
        (torch.bfloat16, "fp8"),
    ],
    ids=str,
)


@FORMS
@pytest.mark.parametrize(("shape", "window"), SHAPES_AND_WINDOWS, ids=str)
def test_equals_the_specification(library, shape, window, dtype, kv):
    native, specification = make_backends(library, shape, dtype=dtype, window=window)
    sequences = make_sequences(shape, num_tokens=200, dtype=dtype, num=len(PARTS))
    for block_size in (1, 16):
        found = attend(native, sequences, PARTS, block_size=block_size, window=window, kv=kv)
        # The specification multiplies what it masks, so it needs numbers everywhere.
        metadata = make_metadata(PARTS, block_size)
        caches = [fill_cache([s[i] for s in sequences], metadata, block_size).nan_to_num(50.0) for i in (1, 2)]
        if kv != "auto":
            caches = [QuantizedKV.of(cache, KV_DTYPES[kv]) for cache in caches]
        q = torch.cat([s[0][before : before + new] for s, (before, new) in zip(sequences, PARTS, strict=True)])
        expected = specification.forward(q, *caches, metadata)
        if dtype == torch.bfloat16:
            # Weights are rounded to bfloat16, by up to 2**-9: of values up to 4, that is 2**-7.
            rtol, atol = 2**-7, 2**-7
        else:
            rtol, atol = 1e-5, 2.5e-6
        torch.testing.assert_close(torch.cat(found), expected, rtol=rtol, atol=atol)


@FORMS
@pytest.mark.parametrize(("shape", "window"), [pair for pair in SHAPES_AND_WINDOWS if pair[1] != 1], ids=str)
def test_a_query_has_the_same_bits_whatever_else_is_computed(library, shape, window, dtype, kv):
    """Decoded or prefilled, in any chunk, along with any other sequence, at any block size and placement."""
    length = 260  # five tiles of keys
    backend, _ = make_backends(library, shape, dtype=dtype, window=window)
    sequences = make_sequences(shape, num_tokens=length, dtype=dtype)
    whole = [attend(backend, [s], [(0, length)], block_size=16, window=window, kv=kv)[0] for s in sequences]
    choose, generator = random.Random(0), torch.Generator().manual_seed(0)
    for _ in range(12):
        chosen, parts = choose.sample(range(3), choose.randrange(1, 4)), []
        for _ in chosen:
            num_new = choose.choice([1, 1, 2, 3, 5, 33, 64, 65, 129])
            parts.append((choose.randrange(length - num_new), num_new))
        block_size = choose.choice([1, 4, 16, 64])
        chosen_sequences, how = [sequences[i] for i in chosen], {"block_size": block_size, "window": window, "kv": kv}
        found = attend(backend, chosen_sequences, parts, **how, generator=generator)
        for i, (before, new), out in zip(chosen, parts, found, strict=True):
            assert torch.equal(out, whole[i][before : before + new]), (
                f"{new} queries after {before}, {len(parts)} sequences"
            )


@pytest.mark.parametrize("kv", ["auto", "int8", "fp8"])
def test_every_instruction_set_gives_the_same_bits_in_float32(kv):
    """In bfloat16, AVX-512 and AMX have products of pairs, each with its own order of sums."""
    shape = (8, 2, 64)
    sequences = make_sequences(shape, num_tokens=200, dtype=torch.float32, num=len(PARTS))
    how = {"block_size": 16, "window": 70, "kv": kv}
    results = [
        torch.cat(
            attend(
                make_backends(native_library(name), shape, dtype=torch.float32, window=70)[0], sequences, PARTS, **how
            )
        )
        for name in ("avx512", "avx2")
    ]
    assert torch.equal(*results)


@pytest.mark.parametrize("name", ["amx", "avx512", "avx2"])
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_a_query_that_is_not_a_number_stays_alone(name, number):
    shape = (4, 2, 32)
    backend, _ = make_backends(native_library(name), shape, dtype=torch.bfloat16, window=None)
    sequences = make_sequences(shape, num_tokens=40, dtype=torch.bfloat16, num=1)
    how = {"block_size": 16, "window": None}
    expected = attend(backend, sequences, [(0, 40)], **how)[0]
    sequences[0][0][21, 3, 5] = number
    found = attend(backend, sequences, [(0, 40)], **how)[0]
    assert found[21, 3].isnan().all()
    found[21, 3] = expected[21, 3]
    assert torch.equal(found, expected)


def test_what_it_cannot_run():
    cpu = torch.device("cpu")
    assert "not torch.float16" in native_obstacle(torch.float16, device=cpu)
    assert "the device is cuda" in native_obstacle(torch.float32, device=torch.device("cuda"))
