"""config.json means what transformers says it means, or is refused by the name of the field that would change the answers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from workers.checkpoint.model_config import load_model_config
from workers.errors import ConfigError
from workers.layers.rotary import inverse_frequencies
from workers.model_numbers import MAX_SIZES

SIZES = {
    "vocab_size": 32_000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
}
MISTRAL: dict[str, Any] = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"} | SIZES
LLAMA: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"} | SIZES
MINISTRAL: dict[str, Any] = {"architectures": ["MinistralForCausalLM"], "model_type": "ministral"} | SIZES
MINISTRAL_3: dict[str, Any] = {"architectures": ["Ministral3ForCausalLM"], "model_type": "ministral3"} | SIZES
NESTED = {"rope_type": "default", "rope_theta": 5e5}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}


def default_frequencies(config: Any, device: str) -> tuple[torch.Tensor, float]:
    return LlamaRotaryEmbedding.compute_default_rope_parameters(config)


def write(folder: Path, fields: dict[str, Any] | str, name: str = "config.json") -> Path:
    (folder / name).write_text(fields if isinstance(fields, str) else json.dumps(fields))
    return folder


@pytest.mark.parametrize("base", [MISTRAL, LLAMA, MINISTRAL, MINISTRAL_3], ids=lambda base: base["model_type"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 4},
        {"head_dim": None},
        {"head_dim": 64},
        {"rms_norm_eps": 1e-5},
        {"sliding_window": None},
        {"sliding_window": 128},
        {"max_position_embeddings": 77},
        {"tie_word_embeddings": True},
        {"eos_token_id": 7},
        {"eos_token_id": [2, 7]},
        {"rope_theta": 1e6},
        {"rope_theta": 1_000_000},
        {"rope_parameters": NESTED},
        {"rope_parameters": NESTED, "rope_theta": 1e6},
        {"rope_parameters": {"rope_type": "default"}, "rope_theta": 1e6},
        {"rope_parameters": {}, "rope_theta": 1e6},
        {"rope_parameters": None, "rope_theta": 1e6},
        {"rope_scaling": None, "rope_theta": 1e6},
        {"rope_scaling": {"type": "default"}, "rope_theta": 1e6},
        {"rope_scaling": {"type": "default", "rope_theta": 3e5}, "rope_parameters": NESTED, "rope_theta": 1e6},
        {"architectures": None},
        {"architectures": []},
        {"quantization_config": None},
        {"layer_types": None},
        {"layer_types": ["full_attention", "full_attention"]},
        {"layer_types": ["full_attention", "full_attention"], "sliding_window": 16},
        {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": None},
        {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1, "use_cache": False},
        {"rope_scaling": LLAMA3, "rope_theta": 5e5},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": YARN | {"rope_theta": 1e6}},
        {"rope_parameters": YARN | {"beta_fast": 16, "beta_slow": 2, "truncate": False, "attention_factor": 1.5}},
        {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "mscale": 0.7, "mscale_all_dim": 0.9}},
    ],
    ids=json.dumps,
)
def test_a_field_means_what_transformers_says(tmp_path: Path, base: dict[str, Any], changes: dict[str, Any]) -> None:
    if base is MINISTRAL_3 and changes == {"head_dim": None}:
        pytest.skip("transformers refuses it")
    fields = base | changes
    ours = load_model_config(write(tmp_path, fields))
    theirs = AutoConfig.from_pretrained(tmp_path)
    # MinistralAttention takes what its configuration leaves open from the other sizes.
    assert ours.head_dim == (theirs.head_dim or theirs.hidden_size // theirs.num_attention_heads)
    for name in {*MAX_SIZES, "rms_norm_eps", "tie_word_embeddings"} - {"head_dim"}:
        assert getattr(ours, name) == getattr(theirs, name), name
    theirs.head_dim = ours.head_dim
    rope = theirs.rope_parameters
    assert ours.rope_theta == rope["rope_theta"]
    frequencies, attention_factor = ROPE_INIT_FUNCTIONS.get(rope["rope_type"], default_frequencies)(theirs, "cpu")
    assert torch.equal(inverse_frequencies(ours.head_dim, ours.rope_theta, ours.rope_scaling), frequencies)
    assert (1.0 if ours.rope_scaling is None else ours.rope_scaling.attention_factor) == attention_factor
    beta = rope.get("llama_4_scaling_beta")
    assert (None if ours.query_scaling is None else ours.query_scaling.beta) == beta
    if ours.query_scaling is not None:
        assert ours.query_scaling.original_max_position_embeddings == rope["original_max_position_embeddings"]
    # LlamaModel computes full attention whatever the file says.
    is_full = base is LLAMA or fields.get("layer_types") == ["full_attention", "full_attention"]
    assert ours.sliding_window == (None if is_full else theirs.sliding_window)
    eos = theirs.eos_token_id
    assert ours.eos_token_ids == (tuple(eos) if isinstance(eos, list) else (eos,))


def test_without_model_type_the_architecture_decides(tmp_path: Path) -> None:
    """transformers needs model_type; old conversions have only the architecture."""
    fields = {name: value for name, value in LLAMA.items() if name != "model_type"}
    assert load_model_config(write(tmp_path, fields)).max_position_embeddings == 2048


def test_model_type_decides_if_both_are_given(tmp_path: Path) -> None:
    fields = MISTRAL | {"model_type": "llama", "sliding_window": 16}
    assert load_model_config(write(tmp_path, fields)).sliding_window is None


@pytest.mark.parametrize(
    ("changes", "param", "words"),
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling", "Rotary scaling 'dynamic'"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_parameters", "Rotary scaling 'longrope'"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, "rope_scaling", "low_freq_factor 4, which is not below"),
        ({"rope_scaling": LLAMA3 | {"factor": -8}}, "rotary scaling factor", "-8, not a number above 0"),
        (
            {"rope_scaling": YARN | {"original_max_position_embeddings": 1.5}},
            "original_max_position_embeddings",
            "1.5, not a whole number above 0",
        ),
        ({"rope_parameters": {"full_attention": NESTED}}, "rope_parameters", "for 'full_attention' layers"),
        ({"rope_parameters": [1]}, "rope_parameters", "not a JSON object"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor", "0.5 is not supported"),
        ({"layer_types": ["chunked_attention"] * 2}, "layer_types", "does not say full_attention or sliding_attention"),
        ({"layer_types": ["full_attention"]}, "layer_types", "for each of 2 layers"),
        ({"layer_types": "full_attention"}, "layer_types", "for each of 2 layers"),
        ({"attention_bias": True}, "attention_bias", "MistralForCausalLM has no biases"),
        ({"text_config": None, "model_type": "mistral3"}, "text_config", "its text_config is None"),
        ({"layer_types": ["sliding_attention"] * 2, "model_type": "llama"}, "layer_types", "a window of their own"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantization_config", "by 'bitsandbytes', which"),
        ({"quantization_config": {"load_in_4bit": True}}, "quantization_config", "by an unknown method, which"),
        ({"architectures": ["MistralForSequenceClassification"]}, "architectures", "is not supported"),
        ({"model_type": "mixtral", "architectures": None}, "model_type", "'mixtral'"),
        ({"model_type": None, "architectures": None}, "model_type", "neither architectures nor model_type"),
        ({"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}, "architectures", "is not supported"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings", "neither true nor false"),
    ],
    ids=json.dumps,
)
def test_what_would_change_the_answers_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], param: str, words: str
) -> None:
    fields = MISTRAL | {"sliding_window": 4096} | changes
    with pytest.raises(ConfigError) as e:
        load_model_config(write(tmp_path, fields))
    assert words in e.value.message and e.value.param == param and e.value.remedy is not None


def test_null_key_value_heads_are_as_many_as_the_others(tmp_path: Path) -> None:
    """transformers 4 says so; transformers 5 refuses null for Mistral."""
    assert load_model_config(write(tmp_path, MISTRAL | {"num_key_value_heads": None})).num_key_value_heads == 16


def test_layer_types_give_each_layer_its_window(tmp_path: Path) -> None:
    """transformers' AutoModel computes MistralForCausalLM with layer_types as Ministral."""
    layer_types = ["full_attention", "sliding_attention"]
    for base in (MISTRAL, MINISTRAL):
        config = load_model_config(write(tmp_path, base | {"layer_types": layer_types, "sliding_window": 16}))
        assert config.sliding_window == config.layer_windows == (None, 16)


def test_the_language_model_of_a_model_with_images(tmp_path: Path) -> None:
    """Small 3.1: the outer file says how the head is tied, the text_config all the rest."""
    fields = {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "model_type": "mistral3",
        "text_config": SIZES | {"head_dim": 128, "model_type": "mistral", "sliding_window": None, "rope_theta": 1e9},
        "vision_config": {"hidden_size": 1024, "model_type": "pixtral"},
        "torch_dtype": "float16",
        "tie_word_embeddings": True,
    }
    config = load_model_config(write(tmp_path, fields))
    assert (config.head_dim, config.rope_theta, config.sliding_window) == (128, 1e9, None)
    assert (config.dtype, config.tie_word_embeddings, config.has_vision) == ("float16", True, True)
    text = MINISTRAL_3 | {"architectures": None}
    config = load_model_config(write(tmp_path, fields | {"text_config": text, "tie_word_embeddings": None}))
    assert config.rope_scaling is not None and config.rope_scaling.factor == 16
    assert (config.head_dim, config.tie_word_embeddings) == (128, False)
    with pytest.raises(ConfigError, match="model_type 'pixtral'"):
        load_model_config(write(tmp_path, fields | {"text_config": {"model_type": "pixtral"}}))


def test_what_is_refused_is_told_what_runs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as e:
        load_model_config(write(tmp_path, MISTRAL | {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}))
    assert e.value.remedy is not None
    for name in ("Mistral", "Llama", "Ministral", "Ministral3"):
        assert f"{name}ForCausalLM" in e.value.remedy
    assert "Mistral3ForConditionalGeneration (its language model)" in e.value.remedy


@pytest.mark.parametrize("layer_types", [["sliding_attention"] * 2, None])
def test_layer_types_that_agree_with_the_window_are_accepted(tmp_path: Path, layer_types: list[str] | None) -> None:
    fields = MISTRAL | {"layer_types": layer_types, "sliding_window": 16}
    assert load_model_config(write(tmp_path, fields)).sliding_window == 16


ABSURD = [10**9, 10**12, 10**400, -1, 0, 2.5, 1e300, "4096", "", True, [], {}, float("nan"), float("inf")]


@pytest.mark.parametrize("name", MAX_SIZES)
@pytest.mark.parametrize("value", ABSURD, ids=lambda v: f"{v!r:.12}")
def test_absurd_sizes_are_refused_by_name(tmp_path: Path, name: str, value: object) -> None:
    if name == "max_position_embeddings" and value == 10**9:
        value = 10**10  # 1e9 positions of a model that scales are conceivable
    with pytest.raises(ConfigError) as e:
        load_model_config(write(tmp_path, MISTRAL | {name: value}))
    assert len(str(e.value)) < 400 and "\n" not in str(e.value) and e.value.remedy


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": None}, "The checkpoint's hidden_size is None, not a whole number"),
        ({"hidden_size": "4096"}, "The checkpoint's hidden_size is '4096', not a whole number"),
        ({"num_attention_heads": 0}, "The checkpoint's num_attention_heads is 0, not a whole number"),
        ({"num_attention_heads": []}, "The checkpoint's num_attention_heads is [], not a whole number"),
        ({"eos_token_id": {}}, "The checkpoint names {} as a bos or eos token"),
        ({"eos_token_id": [[]]}, "The checkpoint names [] as a bos or eos token"),
        ({"num_attention_heads": 9, "head_dim": 8}, "The checkpoint has 9 attention heads"),
        ({"head_dim": 7}, "The checkpoint's head_dim is 7"),
    ],
    ids=str,
)
def test_the_message_is_about_the_field_and_not_about_python(
    tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    fields = {name: value for name, value in MISTRAL.items() if name != "head_dim"}
    with pytest.raises(ConfigError) as e:
        load_model_config(write(tmp_path, fields | changes))
    assert e.value.message.startswith(words) and e.value.remedy


@pytest.mark.parametrize("name", ["rms_norm_eps", "rope_theta"])
@pytest.mark.parametrize(
    "value", [10**400, -1, 0, "1e-5", True, [], {}, float("nan"), float("inf")], ids="{!r:.12}".format
)
def test_absurd_decimals_are_refused_by_name(tmp_path: Path, name: str, value: object) -> None:
    with pytest.raises(ConfigError) as e:
        load_model_config(write(tmp_path, MISTRAL | {"sliding_window": None, name: value}))
    if value not in ([], {}):
        assert e.value.param == name, e.value
    assert len(str(e.value)) < 400


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"hidden_size": ' + "[" * 100_000, "nested too deeply"),
        ('{"a": ' * 100_000, "nested too deeply"),
        ('{"hidden_size": 1' + "0" * 10_000 + "}", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[1]", "not a JSON object"),
        ("", "not valid JSON"),
    ],
    ids=["list", "object", "digits", "open", "array", "empty"],
)
@pytest.mark.parametrize("name", ["config.json", "params.json", "generation_config.json"])
def test_broken_json_is_named(tmp_path: Path, name: str, text: str, words: str) -> None:
    if name == "generation_config.json":
        write(tmp_path, MISTRAL)
    with pytest.raises(ConfigError) as e:
        load_model_config(write(tmp_path, text, name))
    assert e.value.message.startswith(f"{tmp_path / name} is ") and words in e.value.message and e.value.remedy


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        (2, None, (2,)),
        (2, {"eos_token_id": [2, 32]}, (2, 32)),
        (2, {"eos_token_id": 32}, (2, 32)),
        ([2, 7], {"eos_token_id": [32, 7]}, (2, 7, 32)),
        (None, {"eos_token_id": [32]}, (32,)),
        (None, None, (2,)),
        (2, {}, (2,)),
        (2, {"eos_token_id": None}, (2,)),
        # The model has no such tokens, so they end nothing.
        (2, {"eos_token_id": [2, 10**9, -1, "x"]}, (2,)),
    ],
)
def test_both_files_say_which_tokens_end_an_answer(
    tmp_path: Path, config: object, generation: dict[str, Any] | None, expected: tuple[int, ...]
) -> None:
    write(tmp_path, MISTRAL | {"eos_token_id": config})
    if generation is not None:
        write(tmp_path, generation, "generation_config.json")
    assert load_model_config(tmp_path).eos_token_ids == expected


def test_the_layout_with_weights_is_read(tmp_path: Path) -> None:
    params = {
        "dim": 256,
        "n_layers": 2,
        "hidden_dim": 512,
        "n_heads": 16,
        "head_dim": 16,
        "norm_eps": 1e-5,
        "vocab_size": 300,
    }
    write(tmp_path, MISTRAL)
    write(tmp_path, params, "params.json")
    assert load_model_config(tmp_path).layout == "huggingface"
    (tmp_path / "consolidated.safetensors").touch()
    assert load_model_config(tmp_path).layout == "mistral"
    (tmp_path / "model.safetensors").touch()
    assert load_model_config(tmp_path).layout == "huggingface"
