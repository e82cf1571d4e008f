"""Logits of quantised checkpoints beside those of the dense checkpoints that they stand for, on one rank and on two.

Products of whole numbers round their inputs to 8 bits; what becomes dense does not.
"""

import pytest
import torch
from support.fakes.engines import make_config
from support.native import native_library
from support.quantized import packers
from support.quantized.checkpoints import FP8, INT4, INT8, KINDS, WIDE, Kind, compressed, write_quantized
from support.ranks.rank_threads import run_ranks

from workers.attention.backend import AttentionMetadata
from workers.device.model_bytes import weight_bytes
from workers.engine import build
from workers.engine.build import build_runner
from workers.parallel.group import SingleRank

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


@pytest.mark.parametrize("kind", KINDS)
def test_the_need_of_memory_is_what_is_loaded(kind, tmp_path):
    """Scales of compressed-tensors may turn out to be exact in 16 bits; what act-order adds is little in a larger model."""
    native_library("avx2")  # skips where there can be none
    folder, _ = write_quantized(tmp_path, kind)
    config = make_config(folder, num_threads=1)
    weights, orders = 0, 0
    for parameter in build_runner(config, SingleRank()).model.parameters():
        if parameter.dtype is torch.int64:
            orders += parameter.nbytes
        else:
            weights += parameter.nbytes
    expected = weight_bytes(config)
    if "quantized" in kind:
        assert 0.8 * expected < weights <= expected
    else:
        assert weights == expected
    assert (orders > 0) == ("act-order" in kind)


def test_each_shard_of_a_layer_keeps_its_own_form(tmp_path):
    """The key projection is dense, and so is an output head that the layers' scheme does not cover."""
    folder, meant = write_quantized(tmp_path, "gptq", dense=("lm_head", "k_proj", "layers.0.mlp.up_proj"))
    assert 0 < distance(logits_of(folder), logits_of(meant)) < 0.03


def test_several_schemes_in_one_checkpoint(tmp_path):
    """compressed-tensors' "mixed-precision": int8 for the one matrix with 128 inputs, int4 and e4m3 for the others."""

    def pack(weight):
        if weight.shape[1] == WIDE["intermediate_size"]:
            return packers.int_quantized(weight)
        return packers.float8(weight, per="row") if weight.shape[0] == 32 else packers.pack_quantized(weight)

    fields = compressed(INT4 | {"strategy": "group", "group_size": 32}, form="mixed-precision")
    fields["config_groups"]["group_1"] = {"targets": ["re:.*down_proj"], "weights": INT8 | {"strategy": "channel"}}
    fields["config_groups"]["group_2"] = {"targets": ["re:.*[kv]_proj"], "weights": FP8 | {"strategy": "channel"}}
    folder, meant = write_quantized(tmp_path, Kind(pack, {}, fields))
    assert 0 < distance(logits_of(folder), logits_of(meant)) < 0.03
    assert distance(logits_of(folder, size=2), logits_of(meant)) < 0.03


@pytest.mark.parametrize("kind", ["awq", "gptq, act-order", "int-quantized, groups, asymmetric"])
def test_three_ranks(kind, tmp_path):
    """SmolLM2's 9 and 3 heads."""
    sizes = {"hidden_size": 96, "intermediate_size": 288, "head_dim": 32}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "num_hidden_layers": 1}
    folder, meant = write_quantized(tmp_path, kind, **sizes, **heads)
    assert 0 < distance(logits_of(folder, size=3), logits_of(meant)) < 0.03


def test_a_quantised_output_head(tmp_path):
    folder, meant = write_quantized(tmp_path, "gptq, asymmetric", dense=(), vocab_size=264)
    assert 0 < distance(logits_of(folder), logits_of(meant)) < 0.03
    assert 0 < distance(logits_of(folder, size=2), logits_of(meant)) < 0.03


@pytest.mark.parametrize("kind", ["gptq, act-order, asymmetric", "int-quantized"])
def test_every_instruction_set_gives_the_same_bits(kind, tmp_path, monkeypatch):
    folder, _ = write_quantized(tmp_path, kind, dense=())
    native_library("avx2")
    expected = None
    for name in ("avx512", "avx2", None):
        library = None if name is None else native_library(name)
        monkeypatch.setattr(build, "_library", lambda device, library=library: library)
        w = stored_product(folder)
        expected = w if expected is None else expected
        assert torch.equal(w, expected), name


def stored_product(folder):
    """Of one layer: other layers' torch kernels have bits of their own."""
    runner = build_runner(make_config(folder, num_threads=1), SingleRank())
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
    layer = runner.model.model.layers[1].mlp.down_proj
    with torch.inference_mode():
        return layer(x)
