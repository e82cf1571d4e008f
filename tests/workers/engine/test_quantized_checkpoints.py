"""Logits of quantised checkpoints beside those of the dense checkpoints that they stand for, on one rank and on two.

Products of whole numbers round their inputs to 8 bits; what becomes dense does not.
"""

import pytest
import torch
from support.fakes.engines import make_config
from support.quantized.checkpoints import KINDS, write_quantized
from support.ranks.rank_threads import run_ranks

from workers.attention.backend import AttentionMetadata
from workers.engine.build import build_runner

BLOCK = 16
NUM_TOKENS = 40
BECOME_DENSE = ("gptq, groups of 16", "float-quantized", "float-quantized, blocks", "fp8, static", "fp8, dynamic")


def logits_of(folder, *, size=1, **settings):
    """[NUM_TOKENS, vocab_size] of one prompt."""
    config = make_config(folder, tensor_parallel_size=size, num_threads=1, **settings)
    token_ids = torch.randint(0, 256, (NUM_TOKENS,), generator=torch.Generator().manual_seed(0))

    def program(tp):
        runner = build_runner(config, tp)
        model = config.model
        num_blocks = -(-NUM_TOKENS // BLOCK)
        shape = (1 + num_blocks, BLOCK, model.kv_heads_per_rank(tp.size), model.head_dim)
        dtype = getattr(torch, config.dtype)
        kv_caches = [
            (torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)) for _ in range(model.num_hidden_layers)
        ]
        metadata = AttentionMetadata(
            slot_mapping=torch.arange(BLOCK, BLOCK + NUM_TOKENS),
            block_table=torch.arange(1, 1 + num_blocks, dtype=torch.int32).unsqueeze(0),
            seq_lens=torch.tensor([NUM_TOKENS], dtype=torch.int32),
            cu_seqlens_q=torch.tensor([0, NUM_TOKENS], dtype=torch.int32),
            query_lens=[NUM_TOKENS],
            context_lens=[NUM_TOKENS],
            max_query_len=NUM_TOKENS,
            max_seq_len=NUM_TOKENS,
        )
        with torch.inference_mode():
            hidden_states = runner.model(token_ids, torch.arange(NUM_TOKENS), kv_caches, [metadata])
            return runner.model.compute_logits(hidden_states)

    return run_ranks(size, program)[0]


def distance(logits, expected):
    return ((logits - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_dense_weights(kind, tmp_path):
    quantized, meant = write_quantized(tmp_path, kind)
    expected, logits = logits_of(meant), logits_of(quantized)
    if kind in BECOME_DENSE:
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    else:
        assert 0 < distance(logits, expected) < 0.03
    assert distance(logits_of(quantized, size=2), expected) < 0.03
