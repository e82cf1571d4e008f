"""What a plan says of memory, against hand arithmetic and the engine's own rules."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from cuda_host.gpus import GPUS as FAKE_GPUS
from cuda_host.test_memory_sizing import EXPECTED, QUANTIZED

from cluster.plan import memory
from cluster.plan.gpus import GIB, GPUS
from cluster.plan.models import V0_1, V0_3
from workers.config import EngineConfig, ModelConfig
from workers.kv_cache import tensors as kv_cache
from workers.kv_cache.manager import KVCacheManager


def engine(model: ModelConfig, tensor_parallel_size: int = 1, **overrides: Any) -> EngineConfig:
    settings: dict[str, Any] = {
        "model_path": "",
        "device": "cuda",
        "dtype": "bfloat16",
        "max_model_len": 8192,
        "max_num_seqs": 32,
    }
    return EngineConfig(model=model, tensor_parallel_size=tensor_parallel_size, **(settings | overrides))


# By hand, in bytes, for 32 sequences of 8,192 tokens, blocks of 16, bfloat16, and steps of the size that each GPU gets.
#
# Weights of v0.3, one rank: embedding and head 2 x 32,768 x 4,096 = 268,435,456 numbers; a layer has q and o 2 x 4,096 x 4,096, k and v
# 2 x 4,096 x 1,024, feed-forward 3 x 4,096 x 14,336, norms 2 x 4,096: 218,112,000, times 32; the last norm 4,096. 7,248,023,552 numbers,
# 14,496,047,104 bytes. Of these 266,240 are norms, which 2 or 4 ranks hold whole. v0.1 has 768 tokens less: 6,291,456 numbers less.
# Cosines and sines: 8,192 x 2 x 128 x 4 = 8,388,608 on every rank.
# Activations: feed-forward, tokens x ((5 x 4,096 + 3 x 14,336 / ranks) x 2 + 2 x 128 x 4 for the angles). With steps of 2,048 tokens
# 262,144,000, 174,063,616 and 130,023,424; of 4,096 and 8,192, twice and four times as much.
# A block: 2 x 32 layers x 16 tokens x 8 heads x 128 x 2 = 2,097,152 on one rank, 1,048,576 and 524,288 on 2 and 4; the profiling pass has
# two. CUDA 536,870,912, with more ranks as much again for NCCL.
# Graphs of 1, 2, 4, 8, 16 and 32 sequences, with v0.3: 6 x 8,388,608 for the driver; block tables, logits and hidden states
# 32 x (512 x 4 + 32,768 x 4 + 4,096 x 2) = 4,521,984; logits once in bfloat16 and once in float32, 32 x 32,768 x 6 = 6,291,456.
# May be used: 0.9 of 21.98, 39.39, 79.14 and 139.8 GiB = 21,240,760,761, 38,065,221,402, 76,478,335,155 and 135,098,196,295.
HAND = [
    # model, GPU, ranks, weights and rotary, left for the KV cache, blocks, blocks needed
    (V0_3, "A10G", 1, 14_504_435_712, 5_871_970_745, 2798, 16384),
    (V0_3, "A10G", 2, 7_256_678_400, 12_673_034_681, 12084, 16384),
    (V0_3, "A10G", 4, 3_632_799_744, 16_342_002_105, 16384, 16384),
    (V0_3, "A100", 1, 14_504_435_712, 22_434_287_386, 10696, 16384),
    (V0_3, "A100", 2, 7_256_678_400, 29_323_431_706, 16384, 16384),
    (V0_3, "A100", 4, 3_632_799_744, 33_036_439_322, 16384, 16384),
    (V0_3, "A100-80GB", 1, 14_504_435_712, 60_847_401_139, 16384, 16384),
    (V0_3, "A100-80GB", 2, 7_256_678_400, 67_736_545_459, 16384, 16384),
    (V0_3, "A100-80GB", 4, 3_632_799_744, 71_449_553_075, 16384, 16384),
    (V0_3, "H200", 1, 14_504_435_712, 118_942_974_279, 16384, 16384),
    (V0_3, "H200", 2, 7_256_678_400, 126_008_279_367, 16384, 16384),
    (V0_3, "H200", 4, 3_632_799_744, 129_809_367_367, 16384, 16384),
    (V0_1, "A10G", 1, 14_491_852_800, 5_884_799_417, 2805, 8352),
    (V0_1, "A10G", 2, 7_250_386_944, 12_679_571_897, 12091, 8352),
    (V0_1, "A10G", 4, 3_629_654_016, 16_345_393_593, 16384, 8352),
    (V0_1, "A100", 1, 14_491_852_800, 22_447_116_058, 10702, 8480),
    (V0_1, "A100", 2, 7_250_386_944, 29_329_968_922, 16384, 8480),
    (V0_1, "A100", 4, 3_629_654_016, 33_039_830_810, 16384, 8480),
    (V0_1, "A100-80GB", 1, 14_491_852_800, 60_860_229_811, 16384, 8480),
    (V0_1, "A100-80GB", 2, 7_250_386_944, 67_743_082_675, 16384, 8480),
    (V0_1, "A100-80GB", 4, 3_629_654_016, 71_452_944_563, 16384, 8480),
    (V0_1, "H200", 1, 14_491_852_800, 118_955_802_951, 16384, 8736),
    (V0_1, "H200", 2, 7_250_386_944, 126_014_816_583, 16384, 8736),
    (V0_1, "H200", 4, 3_629_654_016, 129_812_758_855, 16384, 8736),
]


@pytest.mark.parametrize(("model", "gpu", "ranks", "weights", "kv_cache_bytes", "blocks", "needed"), HAND)
def test_memory_by_hand(model, gpu, ranks, weights, kv_cache_bytes, blocks, needed):
    config = engine(model, ranks, max_num_batched_tokens=GPUS[gpu].sizes.max_num_batched_tokens)
    found = memory.rank_memory(config, GPUS[gpu])
    assert found.weight_bytes == weights
    assert found.kv_cache_bytes == kv_cache_bytes
    assert (found.num_kv_blocks, found.needed_blocks) == (blocks, needed)
    assert found.fits == (blocks >= needed)
    assert (found.missing_bytes == 0) == found.fits


def test_what_is_missing_is_what_would_be_enough():
    config, gpu = engine(V0_3, max_num_batched_tokens=2048), GPUS["A10G"]
    missing = memory.rank_memory(config, gpu).missing_bytes
    assert missing == 16_385 * 2_097_152 - 5_871_970_745  # 16,384 blocks and the null block, less what there is
    larger = replace(gpu, memory_bytes=gpu.memory_bytes + int(missing / 0.9) + 2)
    smaller = replace(gpu, memory_bytes=gpu.memory_bytes + int(missing / 0.9) - 2)
    assert memory.rank_memory(config, larger).fits
    assert not memory.rank_memory(config, smaller).fits


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


@pytest.mark.parametrize("name", [*EXPECTED, *QUANTIZED])
def test_the_plan_agrees_with_an_engine_on_the_fake_device(name):
    """The engine's own start on each GPU, with all defaults and contexts of 32,768 tokens: see tests/cuda_host/test_memory_sizing.py."""
    blocks, seqs, tokens = (EXPECTED | QUANTIZED)[name]
    gpu_name, quantization = ("A10G", name) if name in QUANTIZED else (name, None)
    gpu = replace(GPUS[gpu_name.removesuffix("-40GB")], memory_bytes=FAKE_GPUS[gpu_name].memory_bytes)
    sizes = gpu.sizes
    assert (sizes.max_num_seqs, sizes.max_num_batched_tokens) == (seqs, tokens)
    sizes_and_form = {"max_num_seqs": seqs, "max_num_batched_tokens": tokens, "quantization": quantization}
    config = engine(V0_3, max_model_len=32_768, **sizes_and_form)
    assert memory.rank_memory(config, gpu).num_kv_blocks == pytest.approx(blocks, rel=0.02)


@pytest.mark.parametrize("window", [None, 1, 255, 256, 257, 4096, (None, 4096, 4096, 4096) * 8])
@pytest.mark.parametrize("length", [1, 256, 2048, 4096, 4352, 4353, 8192, 32_768])
@pytest.mark.parametrize("block_size", [16, 256])
def test_a_sequence_holds_what_the_cache_manager_says(window, length, block_size):
    config = engine(replace(V0_1, sliding_window=window), max_model_len=length, max_num_seqs=1, block_size=block_size)
    windows = [group.window for group in config.model.layer_groups]
    manager = KVCacheManager(num_blocks=1, block_size=block_size, windows=windows, enable_prefix_caching=False)
    planned = memory.rank_memory(config, GPUS["A100"])
    assert planned.blocks_per_sequence == manager.max_blocks_held(length, 1)
    # While a chunk is computed more is held, and the plan has room for it.
    assert planned.needed_blocks >= manager.max_blocks_held(length, config.max_num_batched_tokens)


def test_weights_alone_too_large():
    tiny = replace(GPUS["L4"], memory_bytes=8 * GIB)
    planned = memory.rank_memory(engine(V0_3), tiny)
    assert planned.kv_cache_bytes < 0
    assert (planned.num_kv_blocks, planned.max_sequences, planned.fits) == (0, 0, False)


@pytest.mark.parametrize("size", [1, 2])
def test_slots_for_adapters_are_as_large_as_those_that_the_engine_makes(size, tmp_path):
    """Of a tiny model, whose tables Triton's form has on the CPU as well; and by hand for a 7B."""
    from support.checkpoints.tiny import write_tiny_checkpoint
    from support.ranks.rank_threads import run_ranks

    from workers.checkpoint.model_config import load_model_config
    from workers.kernels.lora.triton_table import TritonLoraTable
    from workers.model.mistral import MistralForCausalLM

    model = load_model_config(write_tiny_checkpoint(tmp_path))
    settings = {"dtype": "float16", "enable_lora": True, "max_loras": 3, "max_lora_rank": 5, "max_model_len": 64}
    config = engine(model, size, **settings)

    def table(in_features, out_sizes):
        return TritonLoraTable(
            in_features, out_sizes, num_slots=3, max_rank=5, dtype=torch.float16, device=torch.device("cpu")
        )

    def held(tp) -> int:
        made = MistralForCausalLM(
            model, tp=tp, backends=[None], dtype=torch.float16, device=torch.device("cpu"), max_positions=64, lora=table
        )
        tensors = [v for layer in made.lora_layers() for v in vars(layer.table).values() if isinstance(v, torch.Tensor)]
        return sum(tensor.nbytes for tensor in tensors)

    assert max(run_ranks(size, held)) == memory.lora_bytes(config), "of the rank with the largest share"
    assert memory.lora_bytes(replace(config, enable_lora=False)) == 0
    of_7b = engine(V0_3, enable_lora=True, max_num_batched_tokens=2048)
    # 64 x 81,920 numbers of 2 bytes in each slot and layer.
    numbers = 32 * 8 * 64 * 81_920 * 2
    assert numbers < memory.lora_bytes(of_7b) < numbers + 100_000
    with_them, without = (memory.rank_memory(c, GPUS["A10G"]) for c in (of_7b, replace(of_7b, enable_lora=False)))
    sums = 2048 * 1 * 14 * 64 * 4  # of down, in steps of 2,048 tokens
    assert with_them.kv_cache_bytes == without.kv_cache_bytes - memory.lora_bytes(of_7b) - sums
