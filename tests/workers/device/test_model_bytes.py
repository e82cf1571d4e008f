"""Bytes of weights, by hand and against a model's own tensors; and whether they fit in a machine's memory."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.checkpoints.tiny import write_tiny_checkpoint
from support.fakes.engines import make_config
from support.native import native_library

from workers.attention.sdpa import SdpaBackend
from workers.config import EngineConfig, ModelConfig
from workers.device.fit import PROCESS_BYTES, check_fits, need_of
from workers.device.memory import Memory
from workers.device.model_bytes import cpu_kv_cache_bytes, num_parameters, rotary_bytes, weight_bytes
from workers.engine.build import build_runner
from workers.errors import ConfigError
from workers.gpu_check.models import MISTRAL_7B
from workers.kernels.quantized_kv import parts_of
from workers.kv_cache.tensors import allocate, num_blocks_that_fit
from workers.model.mistral import MistralForCausalLM
from workers.parallel.group import SingleRank
from workers.rope import QueryScaling

GB = 10**9
MODEL = MISTRAL_7B
TIED = replace(MODEL, tie_word_embeddings=True, vocab_size=1003)
QUERY_SCALING = QueryScaling(beta=0.1, original_max_position_embeddings=64)
BIASED = replace(MODEL, attention_bias=True, mlp_bias=True, query_scaling=QUERY_SCALING)


def engine(model: ModelConfig = MODEL, **settings: Any) -> EngineConfig:
    return EngineConfig(model_path="", model=model, **settings)


# By hand. Matrices: 32 layers of 218,103,808 and a head of 134,217,728 make 7,113,539,584 weights, 222,298,112 groups of 32. The rest, in
# the dtype: the embedding's 134,217,728 and norms of 65 x 4,096 = 266,240.
@pytest.mark.parametrize(
    ("dtype", "quantization", "expected"),
    [
        ("float32", None, 7_248_023_552 * 4),
        ("bfloat16", None, 7_248_023_552 * 2),
        ("bfloat16", "int8", 222_298_112 * 34 + 134_483_968 * 2),
        ("bfloat16", "int4", 222_298_112 * 18 + 134_483_968 * 2),
        ("float32", "int4", 222_298_112 * 18 + 134_483_968 * 4),
    ],
)
def test_weights_of_7b_by_hand(dtype, quantization, expected):
    config = engine(dtype=dtype, quantization=quantization)
    assert num_parameters(config) == 7_248_023_552
    assert weight_bytes(config) == expected


def test_ranks_share_everything_but_the_norms():
    """The attention's and the feed-forward's inputs are divided, 1,024 and 7,168 of each, and so are the head's rows."""
    whole, half = (weight_bytes(engine(tensor_parallel_size=n, quantization="int4")) for n in (1, 2))
    assert half * 2 - whole == 266_240 * 4


def test_a_tied_head_stays_in_the_dtype():
    quantized = engine(TIED, quantization="int4", dtype="bfloat16")
    assert weight_bytes(quantized) == 32 * 218_103_808 // 32 * 18 + (1003 * 4096 + 266_240) * 2


def test_float32_takes_little_more_than_bfloat16_where_that_holds_the_weights():
    """The embedding's 134,217,728 numbers and the norms' 266,240 take four bytes."""
    config = engine(dtype="float32", narrow_weights=True)
    assert weight_bytes(config) == 7_113_539_584 * 2 + 134_483_968 * 4
    with pytest.raises(ConfigError, match=r"weights in float32 \(kept as bfloat16\) 14\.8 GB"):
        check(8 * GB, narrow_weights=True)


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matrices_in_float32_take_what_their_numbers_need(tmp_path, dtype, is_tied):
    native_library("avx2")  # skips where there can be none
    folder = write_tiny_checkpoint(tmp_path, dtype=dtype, tie_word_embeddings=is_tied)
    config = make_config(folder, num_threads=1, narrow_weights=dtype is torch.bfloat16)
    built = build_runner(config, SingleRank()).model
    assert need_of(config).weight_bytes == sum(t.nbytes for t in (*built.parameters(), *built.buffers()))


@pytest.mark.parametrize("size", [1, 2, 8, 16])
@pytest.mark.parametrize("model", [MODEL, TIED, BIASED], ids=["7b", "tied", "biases, scaled queries"])
def test_weights_are_those_of_the_model(size, model):
    config = engine(model, tensor_parallel_size=size, dtype="bfloat16")
    tp: Any = SimpleNamespace(rank=0, size=size)
    heads = {"num_heads": 32 // size, "num_kv_heads": max(1, 8 // size), "head_dim": 128, "sliding_window": None}
    built = MistralForCausalLM(
        model,
        tp=tp,
        backends=[SdpaBackend(**heads)],
        dtype=torch.bfloat16,
        device="meta",
        max_positions=config.max_model_len,
    )
    assert weight_bytes(config) == sum(p.nbytes for p in built.parameters())
    assert rotary_bytes(config) == sum(b.nbytes for b in built.buffers())


@pytest.mark.parametrize(
    "settings",
    [{}, {"num_kv_blocks": 100}, {"kv_cache_bytes": 3 << 30}, {"max_num_seqs": 1}, {"kv_cache_dtype": "int8"}],
)
def test_the_kv_cache_is_as_large_as_the_engine_makes_it(settings):
    config = engine(**settings)
    num_blocks = num_blocks_that_fit(config, torch.device("cpu"))
    assert cpu_kv_cache_bytes(config) == (num_blocks + 1) * config.kv_block_bytes


@pytest.mark.parametrize(
    ("settings", "kib"),
    [
        ({"dtype": "float32"}, 256),
        ({"dtype": "bfloat16"}, 128),
        ({"dtype": "bfloat16", "kv_cache_dtype": "int8"}, 66),
        ({"kv_cache_dtype": "fp8"}, 66),
        ({"dtype": "bfloat16", "kv_cache_dtype": "int8", "tensor_parallel_size": 2}, 33),
    ],
)
def test_a_token_in_the_kv_cache_of_7b_by_hand(settings, kib):
    """32 layers, 8 KV heads, a key and a value of 128 numbers; in 8 bits each has a scale of 4 bytes."""
    config = engine(**settings)
    assert config.kv_token_bytes == kib * 1024
    assert config.kv_block_bytes == 16 * kib * 1024


@pytest.mark.parametrize("form", ["auto", "int8", "fp8"])
def test_the_kv_caches_tensors_take_what_is_planned(form):
    model = replace(MODEL, num_hidden_layers=3, num_key_value_heads=2, num_attention_heads=4, head_dim=10)
    config = engine(model, dtype="bfloat16", kv_cache_dtype=form, block_size=3)
    caches = allocate(config, 7, torch.bfloat16, torch.device("cpu"))
    parts = [part for layer in caches for cache in layer for part in parts_of(cache) if part is not None]
    assert sum(part.nbytes for part in parts) == 8 * config.kv_block_bytes
    assert not any(part.view(torch.uint8).any() for part in parts)


def check(available: int, *, num_ranks: int = 1, **settings: Any) -> str | None:
    memory = Memory(total_bytes=32 * GB, available_bytes=available)
    return check_fits(engine(**settings), num_ranks=num_ranks, memory=memory, where="this machine")


def test_a_model_that_fits_to_the_byte():
    full = need_of(engine()).full_bytes
    assert check(full) is None
    assert check(2 * full, num_ranks=2) is None
    warning = check(full - 1)
    assert warning is not None and warning.startswith("The KV cache may not fit: this machine has 30.5 GB of 32.0 GB")
    loaded = need_of(engine()).loaded_bytes
    assert check(loaded) is not None
    with pytest.raises(ConfigError, match=r"The model does not fit: this machine has 29\.4 GB"):
        check(loaded - 1)


def test_a_kv_cache_in_8_bits_is_named_where_it_would_fit():
    sizes: dict[str, Any] = {"dtype": "bfloat16", "num_kv_blocks": 1024}
    loaded, cache = need_of(engine(**sizes)).loaded_bytes, 1025 * 2_097_152
    warning = check(loaded + cache * 6 // 10, **sizes)
    assert warning is not None and warning.endswith("or less, or --kv-cache-dtype int8 (1.1 GB).")
    assert check(loaded + cache * 6 // 10, **sizes, kv_cache_dtype="int8") is None
    warning = check(loaded + cache * 4 // 10, **sizes)
    assert warning is not None and "--kv-cache-dtype" not in warning


@pytest.mark.parametrize(
    ("available", "settings", "remedy"),
    [
        (
            24 * GB,
            {},
            "--dtype bfloat16 (14.5 GB); --quantization int8 (8.1 GB); --quantization int4 (4.5 GB); a machine with more memory.",
        ),
        (
            8 * GB,
            {"dtype": "bfloat16"},
            "--quantization int4 (4.3 GB); --quantization fp8 (7.4 GB); a machine with more memory.",
        ),
        (
            6 * GB,
            {"dtype": "bfloat16", "quantization": "int8"},
            "--quantization int4 (4.3 GB); a machine with more memory.",
        ),
        (4 * GB, {"dtype": "bfloat16", "quantization": "int4"}, "Use a machine with more memory."),
    ],
)
def test_the_remedies_are_what_would_fit(available, settings, remedy):
    with pytest.raises(ConfigError) as e:
        check(available, **settings)
    assert e.value.remedy is not None and e.value.remedy.endswith(remedy)


def test_all_ranks_of_the_machine_count():
    """Two ranks hold half of the weights each; four are two replicas."""
    assert check(20 * GB, num_ranks=2, dtype="bfloat16", tensor_parallel_size=2) is None
    with pytest.raises(ConfigError, match=r"4 ranks: weights in bfloat16 29\.0 GB.* fewer replicas"):
        check(20 * GB, num_ranks=4, dtype="bfloat16", tensor_parallel_size=2)


def test_a_warning_says_how_large_a_cache_would_fit():
    """14.5 GB of weights and 0.4 GB of the process leave 0.6 GB, which is 571 MiB, of 15.5 GB."""
    need = need_of(engine(dtype="bfloat16"))
    room = 600_000_000
    warning = check(need.weight_bytes + PROCESS_BYTES + room, dtype="bfloat16")
    assert warning is not None and warning.endswith("Use --kv-cache-memory 572MiB or less.")
    assert check(need.weight_bytes + PROCESS_BYTES + room, dtype="bfloat16", kv_cache_bytes=572 << 20) is None


def test_a_model_that_cannot_be_quantized_is_not_told_to():
    odd = replace(MODEL, intermediate_size=14_344)
    with pytest.raises(ConfigError) as e:
        check_fits(engine(odd), num_ranks=1, memory=Memory(total_bytes=9 * GB, available_bytes=8 * GB), where="here")
    assert e.value.remedy == "Use a machine with more memory."
