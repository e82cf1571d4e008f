"""What FlashAttention is asked for; against the specification where a GPU is."""

import pytest
import torch
from support.attention_batches import make_metadata

from workers.attention import flash
from workers.attention.backend import AttentionMetadata
from workers.attention.flash import FlashBackend
from workers.attention.sdpa import SdpaBackend

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
SHAPE = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 64}


@cuda
@pytest.mark.parametrize("window", [None, 1, 100, 256, 700])
def test_equals_the_specification(window):
    block_size = 256
    metadata = make_metadata([(0, 1), (0, 300), (511, 1), (1000, 1), (256, 256), (700, 77)], block_size)
    metadata = AttentionMetadata(
        **{k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in vars(metadata).items()}
    )
    generator = torch.Generator(device="cuda").manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, device="cuda", dtype=torch.bfloat16)

    caches = [randn(1 + int(metadata.block_table.max()), block_size, 2, 64) for _ in range(2)]
    q = randn(sum(metadata.query_lens), 8, 64)
    out = FlashBackend(sliding_window=window, **SHAPE).forward(q, *caches, metadata)
    expected = SdpaBackend(sliding_window=window, **SHAPE).forward(*(x.float() for x in (q, *caches)), metadata)
    torch.testing.assert_close(out.float(), expected, atol=2e-2, rtol=2e-2)


def test_one_query_without_a_window_is_not_masked():
    """Only then does the kernel pack the query heads that share a KV head."""
    backend = FlashBackend(sliding_window=None, **SHAPE)
    assert backend.window_size(1) == (-1, -1)
    assert backend.window_size(2) == (-1, 0)
    assert FlashBackend(sliding_window=100, **SHAPE).window_size(1) == (99, 0)


def test_both_cumulative_lengths_are_given(monkeypatch):
    """torch refuses one without the other, also where a block table makes the second one useless."""
    calls = []
    monkeypatch.setattr(flash, "varlen_attn", lambda *args, **kwargs: calls.append((args, kwargs)) or args[0])
    metadata = make_metadata([(300, 1), (0, 5)], 256)
    q, cache = torch.zeros(6, 8, 64), torch.zeros(4, 256, 2, 64)
    FlashBackend(sliding_window=None, **SHAPE).forward(q, cache, cache, metadata)
    ((*_, cu_seq_q, cu_seq_k, max_q, max_k), options) = calls[0]
    assert cu_seq_q.tolist() == [0, 1, 6] and cu_seq_k.dtype == torch.int32 and cu_seq_k.shape == (3,)
    assert (max_q, max_k) == (5, 301)
    assert options["num_splits"] == 1 and options["enable_gqa"]
