"""How attention is divided into tiles and splits: what a launch depends on. The arithmetic is tested in tests/workers/kernels."""

from itertools import product

import pytest
import torch
from support.attention_batches import make_metadata

from workers.attention import triton_paged
from workers.attention.backend import AttentionMetadata
from workers.attention.triton_paged import SEGMENT, TritonBackend, choose_num_splits, choose_tiles, widest_split

MODEL = {"head_dim": 128, "dtype": torch.bfloat16, "group": 4}


def test_decode_and_prefill_read_keys_in_the_same_tiles():
    devices, dtypes = (80, 86, 89, 90, 100, 120), (torch.float32, torch.float16)
    for capability, dtype, head_dim, group in product(devices, dtypes, (64, 80, 128, 256), (1, 3, 4, 8, 64)):
        short, long = choose_tiles(capability, head_dim=head_dim, dtype=dtype, group=group)
        assert short.keys == long.keys, "a query's bits would depend on the number of queries"
        assert SEGMENT % short.keys == 0, "a segment is a whole number of tiles"
        assert short.rows >= group, "the query heads of a KV head share a tile"


def test_from_hopper_on_all_tiles_use_one_kind_of_matrix_instruction():
    assert choose_tiles(80, **MODEL).short.rows == 16
    short, long = choose_tiles(90, **MODEL)
    assert min(short.rows, long.rows) >= 64


@pytest.mark.parametrize(
    ("num_seqs", "num_segments", "num_splits"),
    [
        (1, 64, 54),  # the examples of the docstring
        (64, 8, 4),
        (1, 1, 1),
        (8, 4, 4),
        (64, 256, 1),  # the partial sums would take 273 MB
    ],
)
def test_number_of_splits(num_seqs, num_segments, num_splits):
    assert num_splits == choose_num_splits(
        num_seqs * 8, num_segments=num_segments, num_rows=num_seqs * 32, head_dim=128, multiprocessors=108
    )


@pytest.mark.parametrize(
    ("num_tokens", "step"),
    [(512, (512, 15 * 512)), (8192, (4032, 2 * 512)), (1, (1, 8065 * 512))],
)
def test_the_step_whose_sums_take_the_most_memory(num_tokens, step):
    """The first two are the docstring's. It is split; with one more segment, and from 4,033 tokens on, no step is."""
    assert widest_split(num_tokens, num_heads=32, head_dim=128) == step
    num_tokens, num_segments = step[0], step[1] // SEGMENT

    def is_split(num_tokens, num_segments):
        sizes = {"num_rows": num_tokens * 32, "head_dim": 128, "multiprocessors": 108}
        return choose_num_splits(8, num_segments=num_segments, **sizes) > 1

    assert is_split(num_tokens, num_segments)
    assert not is_split(num_tokens, num_segments + 1)
    assert not is_split(4033, 2)


@pytest.mark.parametrize(
    ("window", "queries", "max_seq_len", "num_segments"),
    [(None, 4, 512, 1), (None, 4, 513, 2), (4096, 4, 32_768, 10), (4096, 4, 1000, 2), (1, 1, 32_768, 1)],
)
def test_the_most_segments_of_a_tile(window, queries, max_seq_len, num_segments):
    backend = TritonBackend(num_heads=32, num_kv_heads=8, head_dim=128, sliding_window=window)
    assert backend.max_segments(queries, max_seq_len) == num_segments
    if window is not None:
        first = range(max_seq_len - window - queries + 1) if max_seq_len > window + queries else ()
        worst = max(((p + window + queries - 2) // SEGMENT - p // SEGMENT + 1 for p in first), default=0)
        assert worst <= num_segments


class FakeKernel:
    """Records what is launched."""

    def __init__(self, name, launches):
        self.name, self.launches = name, launches

    def __getitem__(self, grid):
        return lambda *args, **constants: self.launches.append((self.name, constants["BLOCK_M"], grid))


@pytest.mark.parametrize(
    ("parts", "max_seq_len", "launches"),
    [
        # (kernel, rows of a tile, grid); a bound of 4,096 keys is 8 segments
        ([(0, 1)] * 64, 4096, [("attention", 16, (64, 8, 4)), ("merge", 16, (64, 8, 2))]),
        ([(0, 1)] * 2, 512, [("attention", 16, (2, 8, 1))]),
        ([(0, 512)], 512, [("attention", 64, (33, 8, 1))]),
        # A chunk among decodes: each launch leaves the other's sequences alone.
        ([(0, 1), (0, 40), (0, 4)], 512, [("attention", 16, (3, 8, 1)), ("attention", 64, (5, 8, 1))]),
    ],
)
def test_a_launch_depends_on_shapes_and_bounds_only(parts, max_seq_len, launches, monkeypatch):
    """So it can be captured in a CUDA graph: tensors without data make any read of them an error."""
    launched = []
    for name in ("attention", "merge"):
        monkeypatch.setattr(triton_paged, f"{name}_kernel", FakeKernel(name, launched))
    metadata = make_metadata(parts, 16, max_seq_len=max_seq_len)
    metadata = AttentionMetadata(
        **{k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in vars(metadata).items()}
    )
    backend = TritonBackend(num_heads=32, num_kv_heads=8, head_dim=128, sliding_window=None)
    cache = torch.empty(9, 16, 8, 128, dtype=torch.bfloat16, device="meta")
    q = torch.empty(sum(n for _, n in parts), 32, 128, dtype=torch.bfloat16, device="meta")
    assert backend.forward(q, cache, cache, metadata).shape == q.shape
    assert launched == launches
