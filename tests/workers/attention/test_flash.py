"""The CUDA kernel against the specification. Runs where a GPU is."""

import pytest
import torch

from workers.attention.backend import AttentionMetadata
from workers.attention.sdpa import SdpaBackend
from workers.attention.select import select_backend

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
SHAPE = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 64}


@cuda
@pytest.mark.parametrize("window", [None, 1, 100, 256, 700])
def test_equals_the_specification(window):
    device, block_size = torch.device("cuda"), 256
    sequences = [(0, 1), (0, 300), (511, 1), (1000, 1), (256, 256), (700, 77)]
    generator = torch.Generator(device="cuda").manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.bfloat16)

    width = 5
    table = torch.arange(1, 1 + len(sequences) * width, device=device, dtype=torch.int32).view(-1, width)
    num_tokens = sum(n for _, n in sequences)
    positions = [p for before, new in sequences for p in range(before, before + new)]
    owners = [i for i, (_, new) in enumerate(sequences) for _ in range(new)]
    slots = [
        int(table[i, p // block_size]) * block_size + p % block_size for i, p in zip(owners, positions, strict=True)
    ]
    query_lens = [new for _, new in sequences]
    seq_lens = [before + new for before, new in sequences]
    metadata = AttentionMetadata(
        slot_mapping=torch.tensor(slots, device=device),
        block_table=table,
        seq_lens=torch.tensor(seq_lens, device=device, dtype=torch.int32),
        cu_seqlens_q=torch.tensor([0, *torch.tensor(query_lens).cumsum(0)], device=device, dtype=torch.int32),
        query_lens=query_lens,
        context_lens=seq_lens,
        max_query_len=max(query_lens),
        max_seq_len=max(seq_lens),
    )
    caches = [randn(1 + len(sequences) * width, block_size, 2, 64) for _ in range(2)]
    q, k, v = randn(num_tokens, 8, 64), randn(num_tokens, 2, 64), randn(num_tokens, 2, 64)
    flash = select_backend(device=device, dtype=q.dtype, block_size=block_size, sliding_window=window, **SHAPE)
    assert flash.name == "flash"
    out = flash.forward(q, k, v, *(c.clone() for c in caches), metadata)
    reference = SdpaBackend(sliding_window=window, **SHAPE)
    expected = reference.forward(*(x.float() for x in (q, k, v, *caches)), metadata)
    torch.testing.assert_close(out.float(), expected, atol=2e-2, rtol=2e-2)


def test_the_cpu_uses_the_specification():
    backend = select_backend(
        device=torch.device("cpu"), dtype=torch.float32, block_size=16, sliding_window=None, **SHAPE
    )
    assert backend.name == "sdpa"


@pytest.mark.parametrize(
    ("dtype", "block_size", "reason"),
    [(torch.float32, 256, "float16 or bfloat16"), (torch.bfloat16, 16, "multiple of 256")],
)
def test_a_fallback_on_cuda_says_why(dtype, block_size, reason, caplog):
    backend = select_backend(
        device=torch.device("cuda"), dtype=dtype, block_size=block_size, sliding_window=None, **SHAPE
    )
    assert backend.name == "sdpa"
    assert reason in caplog.text
