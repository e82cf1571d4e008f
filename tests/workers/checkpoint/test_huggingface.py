"""config.json means what transformers says it means, or is refused by the name of the field that would change the answers."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from workers.checkpoint.model_config import load_model_config
from workers.config import MAX_SIZES
from workers.errors import ConfigError

SIZES = {
    "vocab_size": 32_000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
}
MISTRAL: dict[str, Any] = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"} | SIZES
LLAMA: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"} | SIZES
NESTED = {"rope_type": "default", "rope_theta": 5e5}


def write(folder: Path, fields: dict[str, Any] | str, name: str = "config.json") -> Path:
    (folder / name).write_text(fields if isinstance(fields, str) else json.dumps(fields))
    return folder


@pytest.mark.parametrize("base", [MISTRAL, LLAMA], ids=["mistral", "llama"])
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
    ],
    ids=json.dumps,
)
def test_a_field_means_what_transformers_says(tmp_path: Path, base: dict[str, Any], changes: dict[str, Any]) -> None:
    fields = base | changes
    ours = load_model_config(write(tmp_path, fields))
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert ours.head_dim == (theirs.head_dim or theirs.hidden_size // theirs.num_attention_heads)
    for name in {*MAX_SIZES, "rms_norm_eps", "tie_word_embeddings"} - {"head_dim"}:
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
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
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling", "Rotary scaling 'llama3'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling", "Rotary scaling 'linear'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling", "Rotary scaling 'dynamic'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_parameters", "Rotary scaling 'yarn'"),
        ({"rope_parameters": {"full_attention": NESTED}}, "rope_parameters", "for 'full_attention' layers"),
        ({"rope_parameters": [1]}, "rope_parameters", "not a JSON object"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor", "0.5 is not supported"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types", "a window of their own"),
        ({"layer_types": ["chunked_attention"] * 2}, "layer_types", "a window of their own"),
        ({"layer_types": ["sliding_attention"] * 2, "model_type": "llama"}, "layer_types", "a window of their own"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config", "('gptq')"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config", "('awq')"),
        ({"quantization_config": {"load_in_4bit": True}}, "quantization_config", "Quantized checkpoints are"),
        ({"compression_config": {"format": "pack-quantized"}}, "quantization_config", "Quantized checkpoints are"),
        ({"architectures": ["MistralForSequenceClassification"]}, "architectures", "is not supported"),
        ({"model_type": "mixtral", "architectures": None}, "model_type", "'mixtral'"),
        ({"model_type": None, "architectures": None}, "model_type", "neither architectures nor model_type"),
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
    assert len(str(e.value)) < 400 and "\n" not in str(e.value)


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
