"""The sdpa backend against attention written as loops, over GQA, windows, paging and mixed batches."""

import math
import random

import pytest
import torch
from support.attention_batches import store_kv

from workers.attention.backend import AttentionMetadata
from workers.attention.sdpa import SdpaBackend

HEAD_DIM = 8


@pytest.fixture
def threads():
    """Sets torch's threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def naive_attention(q, keys, values, window):
    """q: [num_heads, head_dim] at the position of the last key; keys, values: [num_keys, num_kv_heads, head_dim]."""
    num_heads, num_kv_heads = q.shape[0], keys.shape[1]
    keys, values = (x[-window:] if window else x for x in (keys, values))
    out = torch.empty_like(q)
    for head in range(num_heads):
        kv = head // (num_heads // num_kv_heads)
        weights = torch.softmax(keys[:, kv] @ q[head] / math.sqrt(HEAD_DIM), dim=0)
        out[head] = weights @ values[:, kv]
    return out


def make_batch(sequences, block_size, num_kv_heads, generator):
    """sequences: (num computed before, num new). Returns caches with the earlier tokens stored, metadata, and all K and
    V.
    """
    num_blocks = 1 + sum(-(-(a + b) // block_size) for a, b in sequences)
    k_cache = torch.full((num_blocks, block_size, num_kv_heads, HEAD_DIM), 50.0)  # loud where it must not be seen
    v_cache = k_cache.clone()
    free = torch.randperm(num_blocks - 1, generator=generator).add(1).tolist()
    tables, slots, everything = [], [], []
    for before, new in sequences:
        table = [free.pop() for _ in range(-(-(before + new) // block_size))]
        keys, values = (torch.randn(before + new, num_kv_heads, HEAD_DIM, generator=generator) for _ in range(2))
        for position in range(before):
            k_cache[table[position // block_size], position % block_size] = keys[position]
            v_cache[table[position // block_size], position % block_size] = values[position]
        slots += [table[p // block_size] * block_size + p % block_size for p in range(before, before + new)]
        tables.append(table)
        everything.append((keys, values))
    width = max(map(len, tables))
    query_lens = [new for _, new in sequences]
    seq_lens = [before + new for before, new in sequences]
    metadata = AttentionMetadata(
        slot_mapping=torch.tensor(slots),
        block_table=torch.tensor([t + [0] * (width - len(t)) for t in tables], dtype=torch.int32),
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
        cu_seqlens_q=torch.tensor([0, *torch.tensor(query_lens).cumsum(0)], dtype=torch.int32),
        query_lens=query_lens,
        context_lens=seq_lens,
        max_query_len=max(query_lens),
        max_seq_len=max(seq_lens),
    )
    return k_cache, v_cache, metadata, everything


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("window", [None, 5, 100])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(2, 2, 8), (4, 2, 32), (3, 1, 128), (8, 2, 64)])
def test_a_query_has_the_same_bits_whatever_else_is_computed(
    num_heads, num_kv_heads, head_dim, window, num_threads, threads
):
    """Decoded or prefilled, in any chunk, along with any other sequence, at any block size and placement."""
    threads(num_threads)
    length = 260  # five tiles of keys
    generator = torch.Generator().manual_seed(0)
    shapes = [(length, heads, head_dim) for heads in (num_heads, num_kv_heads, num_kv_heads)]
    sequences = [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(3)]
    backend = SdpaBackend(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, sliding_window=window)

    def attend(parts, block_size):
        """parts: (sequence, num computed before, num new)."""
        k_cache, _, metadata, _ = make_batch([part[1:] for part in parts], block_size, num_kv_heads, generator)
        caches = [torch.randn(*k_cache.shape[:3], head_dim, generator=generator) for _ in range(2)]
        for (i, before, _), table in zip(parts, metadata.block_table, strict=True):
            positions = torch.arange(before)
            slots = table[positions // block_size].long() * block_size + positions % block_size
            for cache, stored in zip(caches, sequences[i][1:], strict=True):
                cache.view(-1, num_kv_heads, head_dim)[slots] = stored[:before]
        q, k, v = (torch.cat([sequences[i][j][before : before + n] for i, before, n in parts]) for j in range(3))
        store_kv(k, v, *caches, metadata.slot_mapping)
        return backend.forward(q, *caches, metadata).split([n for *_, n in parts])

    whole = [attend([(i, 0, length)], 16)[0] for i in range(3)]
    choose = random.Random(0)
    for _ in range(12):
        parts = []
        for i in choose.sample(range(3), choose.randrange(1, 4)):
            num_new = choose.choice([1, 1, 2, 3, 5, 33, 64, 65, 129])
            parts.append((i, choose.randrange(length - num_new), num_new))
        for (i, before, n), out in zip(parts, attend(parts, choose.choice([1, 4, 16, 64])), strict=True):
            assert torch.equal(out, whole[i][before : before + n]), (
                f"{n} queries after {before}, {len(parts)} sequences"
            )


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("window", [None, 1, 5, 8, 100])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (4, 2), (6, 1)])
def test_equals_naive_attention(block_size, window, num_heads, num_kv_heads):
    generator = torch.Generator().manual_seed(block_size * 100 + (window or 0))
    sequences = [(0, 1), (0, 13), (9, 1), (31, 1), (7, 6), (16, 16), (3, 1)]
    k_cache, v_cache, metadata, everything = make_batch(sequences, block_size, num_kv_heads, generator)
    q = torch.randn(sum(n for _, n in sequences), num_heads, HEAD_DIM, generator=generator)
    new = [torch.cat([kv[i][before:] for (before, _), kv in zip(sequences, everything, strict=True)]) for i in range(2)]
    backend = SdpaBackend(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=HEAD_DIM, sliding_window=window)
    store_kv(*new, k_cache, v_cache, metadata.slot_mapping)
    out = backend.forward(q, k_cache, v_cache, metadata)
    row = 0
    for (before, num_new), (keys, values) in zip(sequences, everything, strict=True):
        for position in range(before, before + num_new):
            expected = naive_attention(q[row], keys[: position + 1], values[: position + 1], window)
            torch.testing.assert_close(out[row], expected, atol=2e-5, rtol=2e-5)
            row += 1


def test_released_blocks_are_never_seen():
    """Blocks that the window has passed are the null block in the table: filling it with NaN-like values changes no bit."""
    window, block_size = 6, 4
    generator = torch.Generator().manual_seed(1)
    k_cache, v_cache, metadata, everything = make_batch([(20, 1), (18, 3)], block_size, 2, generator)
    q = torch.randn(4, 4, HEAD_DIM, generator=generator)
    k, v = (torch.cat([everything[0][i][20:], everything[1][i][18:]]) for i in range(2))
    store_kv(k, v, k_cache, v_cache, metadata.slot_mapping)
    expected = SdpaBackend(num_heads=4, num_kv_heads=2, head_dim=HEAD_DIM, sliding_window=window).forward(
        q, k_cache.clone(), v_cache.clone(), metadata
    )
    metadata.block_table[0, : (20 - window + 1) // block_size] = 0
    metadata.block_table[1, : (18 - window + 1) // block_size] = 0
    k_cache[0], v_cache[0] = 1e4, 1e4
    out = SdpaBackend(num_heads=4, num_kv_heads=2, head_dim=HEAD_DIM, sliding_window=window).forward(
        q, k_cache, v_cache, metadata
    )
    assert torch.equal(out, expected)
