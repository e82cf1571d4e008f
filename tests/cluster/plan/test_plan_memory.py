"""What a plan says of memory, against hand arithmetic, the model's own tensors and the engine's own rules."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cluster.plan import memory
from cluster.plan.gpus import GIB, GPUS
from cluster.plan.models import V0_1, V0_3
from workers.attention.sdpa import SdpaBackend
from workers.config import EngineConfig, ModelConfig
from workers.kv_cache import tensors as kv_cache
from workers.kv_cache.manager import KVCacheManager
from workers.model.mistral import MistralForCausalLM


def engine(model: ModelConfig, tensor_parallel_size: int = 1, **overrides: Any) -> EngineConfig:
    settings: dict[str, Any] = {
        "model_path": "",
        "device": "cuda",
        "dtype": "bfloat16",
        "max_model_len": 8192,
        "block_size": 256,
        "max_num_seqs": 32,
    }
    return EngineConfig(model=model, tensor_parallel_size=tensor_parallel_size, **(settings | overrides))


# By hand, in bytes, for 32 sequences of 8,192 tokens, steps of 1,024 tokens, blocks of 256, bfloat16.
#
# Weights of v0.3, one rank: embedding and head 2 x 32,768 x 4,096 = 268,435,456 numbers; a layer has q and o 2 x 4,096 x 4,096, k and v
# 2 x 4,096 x 1,024, feed-forward 3 x 4,096 x 14,336, norms 2 x 4,096: 218,112,000, times 32; the last norm 4,096. 7,248,023,552 numbers,
# 14,496,047,104 bytes. Of these 266,240 are norms, which 2 or 4 ranks hold whole. v0.1 has 768 tokens less: 6,291,456 numbers less.
# Cosines and sines: 8,192 x 2 x 128 x 4 = 8,388,608 on every rank.
# Activations: feed-forward, 1,024 x (3 x 4,096 + 4 x 14,336 / ranks) x 2, and the step's angles, 1,024 x 2 x 128 x 4: 143,654,912,
# 84,934,656 and 55,574,528.
# A block: 2 x 32 layers x 256 tokens x 8 heads x 128 x 2 = 33,554,432 on one rank, 16,777,216 and 8,388,608 on 2 and 4; the profiling
# pass has two. CUDA 536,870,912, with more ranks as much again for NCCL.
# May be used: 0.9 of 21.98, 39.39 and 79.14 GiB = 21,240,760,761, 38,065,221,402 and 76,478,335,155.
HAND = [
    # model, GPU, ranks, weights and rotary, left for the KV cache, blocks, blocks needed
    (V0_3, "A10G", 1, 14_504_435_712, 5_988_690_361, 177, 1024),
    (V0_3, "A10G", 2, 7_256_678_400, 12_791_851_449, 761, 1024),
    (V0_3, "A10G", 4, 3_632_799_744, 16_461_867_449, 1024, 1024),
    (V0_3, "A100", 1, 14_504_435_712, 22_813_151_002, 678, 1024),
    (V0_3, "A100", 2, 7_256_678_400, 29_616_312_090, 1024, 1024),
    (V0_3, "A100", 4, 3_632_799_744, 33_286_328_090, 1024, 1024),
    (V0_3, "A100-80GB", 1, 14_504_435_712, 61_226_264_755, 1024, 1024),
    (V0_3, "A100-80GB", 2, 7_256_678_400, 68_029_425_843, 1024, 1024),
    (V0_3, "A100-80GB", 4, 3_632_799_744, 71_699_441_843, 1024, 1024),
    (V0_1, "A10G", 1, 14_491_852_800, 6_001_273_273, 177, 548),
    (V0_1, "A10G", 2, 7_250_386_944, 12_798_142_905, 761, 548),
    (V0_1, "A10G", 4, 3_629_654_016, 16_465_013_177, 1024, 548),
    (V0_1, "A100", 1, 14_491_852_800, 22_825_733_914, 679, 548),
    (V0_1, "A100", 2, 7_250_386_944, 29_622_603_546, 1024, 548),
    (V0_1, "A100", 4, 3_629_654_016, 33_289_473_818, 1024, 548),
    (V0_1, "A100-80GB", 1, 14_491_852_800, 61_238_847_667, 1024, 548),
    (V0_1, "A100-80GB", 2, 7_250_386_944, 68_035_717_299, 1024, 548),
    (V0_1, "A100-80GB", 4, 3_629_654_016, 71_702_587_571, 1024, 548),
]


@pytest.mark.parametrize(("model", "gpu", "ranks", "weights", "kv_cache_bytes", "blocks", "needed"), HAND)
def test_memory_by_hand(model, gpu, ranks, weights, kv_cache_bytes, blocks, needed):
    found = memory.rank_memory(engine(model, ranks), GPUS[gpu])
    assert found.weight_bytes == weights
    assert found.kv_cache_bytes == kv_cache_bytes
    assert (found.num_kv_blocks, found.needed_blocks) == (blocks, needed)
    assert found.fits == (blocks >= needed)
    assert (found.missing_bytes == 0) == found.fits


def test_what_is_missing_is_what_would_be_enough():
    config, gpu = engine(V0_3), GPUS["A10G"]
    missing = memory.rank_memory(config, gpu).missing_bytes
    assert missing == 1025 * 33_554_432 - 5_988_690_361  # 1,024 blocks and the null block, less what there is
    larger = replace(gpu, memory_bytes=gpu.memory_bytes + int(missing / 0.9) + 2)
    smaller = replace(gpu, memory_bytes=gpu.memory_bytes + int(missing / 0.9) - 2)
    assert memory.rank_memory(config, larger).fits
    assert not memory.rank_memory(config, smaller).fits


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True, "vocab_size": 1003}], ids=["7b", "tied"])
def test_weights_are_those_of_the_model(size, changes):
    config = engine(replace(V0_3, **changes), size)
    tp: Any = SimpleNamespace(rank=0, size=size)
    heads = {
        "num_heads": V0_3.num_attention_heads // size,
        "num_kv_heads": V0_3.num_key_value_heads // size,
        "head_dim": V0_3.head_dim,
        "sliding_window": None,
    }
    model = MistralForCausalLM(
        config.model,
        tp=tp,
        backend=SdpaBackend(**heads),
        dtype=torch.bfloat16,
        device="meta",
        max_positions=config.max_model_len,
    )
    assert memory.weight_bytes(config) == sum(p.nbytes for p in model.parameters())
    assert memory.rotary_bytes(config) == sum(b.nbytes for b in model.buffers())


@pytest.mark.parametrize("gpu", ["A10G", "A100", "A100-80GB"])
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("num_seqs", [32, 512])
def test_the_engine_finds_as_many_blocks_in_the_same_memory(monkeypatch, gpu, size, num_seqs):
    config = engine(V0_3, size, max_num_seqs=num_seqs)
    planned = memory.rank_memory(config, GPUS[gpu])
    # As the driver and torch's allocator would say it after the profiling pass: the allocator holds weights, and keeps what it
    # has reserved for activations.
    held = planned.weight_bytes
    reserved = held + planned.activation_bytes
    free = planned.total_bytes - planned.reserved_bytes - reserved
    stats = {
        "allocated_bytes.all.peak": held + planned.activation_bytes,
        "allocated_bytes.all.current": held,
        "reserved_bytes.all.current": reserved,
    }
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, planned.total_bytes))
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda _: stats)
    assert kv_cache.num_blocks_that_fit(config, torch.device("cuda")) == planned.num_kv_blocks


@pytest.mark.parametrize("window", [None, 1, 255, 256, 257, 4096])
@pytest.mark.parametrize("length", [1, 256, 2048, 4096, 4352, 4353, 8192, 32_768])
def test_a_sequence_holds_what_the_cache_manager_says(window, length):
    manager = KVCacheManager(num_blocks=1, block_size=256, sliding_window=window, enable_prefix_caching=False)
    config = engine(replace(V0_1, sliding_window=window), max_model_len=length, max_num_seqs=1)
    planned = memory.rank_memory(config, GPUS["A100"])
    assert planned.blocks_per_sequence == manager.max_blocks_held(length, 1)
    # While a chunk is computed more is held, and the plan has room for it.
    assert planned.needed_blocks >= manager.max_blocks_held(length, config.max_num_batched_tokens)


def test_weights_alone_too_large():
    tiny = replace(GPUS["L4"], memory_bytes=8 * GIB)
    planned = memory.rank_memory(engine(V0_3), tiny)
    assert planned.kv_cache_bytes < 0
    assert (planned.num_kv_blocks, planned.max_sequences, planned.fits) == (0, 0, False)
