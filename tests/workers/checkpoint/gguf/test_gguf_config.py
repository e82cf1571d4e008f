"""The metadata of a GGUF file as a configuration, and each thing that cannot run by its name."""

import numpy as np
import pytest
from support.checkpoints.gguf_files import write_gguf
from support.checkpoints.tiny import make_tiny_model

from workers.checkpoint.model_config import load_model_config
from workers.errors import ConfigError
from workers.rope import QueryScaling

YARN = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 2.0}


def config_of(tmp_path, **settings):
    return load_model_config(write_gguf(tmp_path / "model.gguf", **settings))


def test_all_fields(tmp_path):
    config = config_of(tmp_path)
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (256, 64, 96)
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (2, 8, 4)
    assert config.head_dim == 8 and config.max_position_embeddings == 4096
    assert config.rms_norm_eps == 1e-5 and config.rope_theta == 10_000.0  # float32 in the file
    assert not config.tie_word_embeddings and config.sliding_window is None
    assert (config.bos_token_id, config.eos_token_ids) == (1, (2,))
    assert (config.layout, config.dtype) == ("gguf", "bfloat16")


@pytest.mark.parametrize(("dtype", "expected"), [("F32", "float32"), ("F16", "float16"), ("Q8_0", "bfloat16")])
def test_the_type_to_compute_in(tmp_path, dtype, expected):
    config = config_of(tmp_path, dtype=dtype)
    assert config.dtype == expected and (config.stored is None) == (dtype != "Q8_0")


def test_what_old_and_other_files_lack(tmp_path):
    keys = ("vocab_size", "attention.head_count_kv", "attention.key_length", "attention.value_length", "rope.freq_base")
    missing = {f"llama.{key}": None for key in keys} | {"tokenizer.ggml.bos_token_id": None}
    config = config_of(tmp_path, metadata=missing, model=make_tiny_model(num_key_value_heads=8, sliding_window=None))
    assert config.num_key_value_heads == 8 and config.head_dim == 8 and config.rope_theta == 10_000.0
    assert config.vocab_size == 256 and config.bos_token_id == 2


def test_every_end_token_counts(tmp_path):
    ends = {"tokenizer.ggml.eos_token_id": 7, "tokenizer.ggml.eot_token_id": 5, "tokenizer.ggml.eom_token_id": 7}
    assert config_of(tmp_path, metadata=ends).eos_token_ids == (7, 5)


def test_a_tied_head_has_no_tensor(tmp_path):
    assert config_of(tmp_path, without=("output.weight",)).tie_word_embeddings


def test_windows(tmp_path):
    window = {"llama.attention.sliding_window": 16}
    assert config_of(tmp_path, metadata=window).sliding_window == 16
    window["llama.attention.sliding_window_pattern"] = [True, False]
    assert config_of(tmp_path, metadata=window).sliding_window == (16, None)
    window["llama.attention.sliding_window_pattern"] = [True]
    with pytest.raises(ConfigError, match=r"sliding_window_pattern is \[True\], which does not say yes or no"):
        config_of(tmp_path, metadata=window)


def test_the_fields_of_mistral3(tmp_path):
    scaling = {
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 16.0,
        "llama.rope.scaling.original_context_length": 16384,
        "llama.rope.scaling.yarn_log_multiplier": 1.0,
        "llama.rope.scaling.yarn_beta_fast": 32.0,
        "llama.attention.temperature_scale": 0.1,
    }
    config = config_of(tmp_path, architecture="mistral3", metadata=scaling)
    assert config.query_scaling == QueryScaling(beta=0.1, original_max_position_embeddings=16384)
    rope = config.rope_scaling
    assert rope is not None and (rope.rope_type, rope.factor, rope.attention_factor) == ("yarn", 16.0, 1.0)


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"llama.block_count": None}, "lacks the field 'llama.block_count'"),
        ({"llama.expert_count": 8}, "mixture of 8 experts"),
        ({"llama.final_logit_softcapping": 30.0}, "has llama.final_logit_softcapping, which is not supported"),
        ({"llama.rope.dimension_count": 4}, "llama.rope.dimension_count is 4 and its head size 8"),
        ({"llama.rope.scaling.type": "longrope"}, "rotary scaling 'longrope' is not supported"),
        ({"llama.feed_forward_length": [96, 32]}, "llama.feed_forward_length differs from layer to layer"),
        ({"llama.attention.head_count": "eight"}, "num_attention_heads is 'eight'"),
        ({"llama.attention.layer_norm_rms_epsilon": 0.0}, "layer_norm_rms_epsilon is 0.0, not a number above 0"),
        ({"tokenizer.ggml.eos_token_id": 256}, "names 256 as a bos or eos token"),
        ({"tokenizer.ggml.eos_token_id": [2]}, "names [2] as a bos or eos token"),
        (YARN | {"llama.rope.scaling.original_context_length": 0}, "original_context_length is 0, not a whole number"),
        (YARN | {"llama.rope.scaling.original_context_length": "4k"}, "original_context_length is '4k', not a whole"),
    ],
)
def test_what_cannot_run_is_named(tmp_path, metadata, words):
    with pytest.raises(ConfigError) as e:
        config_of(tmp_path, metadata=metadata)
    assert words in e.value.message


def test_another_architecture_is_refused_with_those_that_run(tmp_path):
    with pytest.raises(ConfigError) as e:
        config_of(tmp_path, architecture="qwen2")
    assert e.value.message == "The GGUF file's architecture 'qwen2' is not supported."
    assert e.value.remedy is not None and "'llama' or 'mistral3'" in e.value.remedy


def test_factors_are_plain_floats(tmp_path):
    with pytest.raises(ConfigError, match=r"rope_freqs\.weight .* is of type F16"):
        config_of(tmp_path, tensors={"rope_freqs.weight": np.ones(4, dtype=np.float16)})


def test_what_the_matrices_take_in_memory(tmp_path):
    """A sixth of the weights each is in down_proj, in 18 bits, and in up_proj, as plain numbers."""
    model = make_tiny_model(sliding_window=None, hidden_size=256, intermediate_size=256, head_dim=32)
    kinds = {"down_proj": "Q6_K", "up_proj": "IQ2_XS", "embed": "Q5_0", "lm_head": "Q8_0", "": "Q4_0"}
    stored = config_of(tmp_path, model=model, dtype=kinds).stored
    assert stored is not None and stored.label == "GGUF Q4_0, IQ2_XS and Q6_K (IQ2_XS as plain numbers)"
    share = 1 / 6  # q and o are as large as these, and k and v half as large
    assert stored.dense_share == pytest.approx(share) and stored.head_bits == 8.5
    assert stored.layer_bits == pytest.approx(18 * share + 4.5 * (1 - 2 * share))
