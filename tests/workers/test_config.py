"""Both layouts' configuration files, read and refused."""

import json
from pathlib import Path

import pytest

from workers.checkpoint.model_config import load_model_config
from workers.config import EngineConfig, ModelConfig, requested_num_threads
from workers.errors import ConfigError

HUGGINGFACE_V01 = {
    "architectures": ["MistralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 32000,
}
MISTRAL_V01 = {
    "dim": 4096,
    "n_layers": 32,
    "head_dim": 128,
    "hidden_dim": 14336,
    "n_heads": 32,
    "n_kv_heads": 8,
    "norm_eps": 1e-05,
    "sliding_window": 4096,
    "vocab_size": 32000,
}


def write(folder: Path, fields: object, name: str) -> Path:
    (folder / name).write_text(fields if isinstance(fields, str) else json.dumps(fields))
    return folder


def model_config(**changes: object) -> ModelConfig:
    fields = {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "sliding_window": None,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_ids": (2,),
        "dtype": "float32",
        "layout": "huggingface",
    }
    return ModelConfig(**{**fields, **changes})  # type: ignore[arg-type]


def test_the_two_layouts_of_v01_differ_in_layout_only(tmp_path: Path) -> None:
    huggingface = write(tmp_path, HUGGINGFACE_V01, "config.json")
    (tmp_path / "mistral").mkdir()
    mistral = write(tmp_path / "mistral", MISTRAL_V01, "params.json")
    a, b = load_model_config(huggingface), load_model_config(mistral)
    assert (a.layout, b.layout) == ("huggingface", "mistral")
    for name in ModelConfig.__dataclass_fields__:
        if name != "layout":
            assert getattr(a, name) == getattr(b, name), name
    assert (a.head_dim, a.sliding_window, a.rope_theta, a.eos_token_ids) == (128, 4096, 10_000.0, (2,))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"sliding_window": None, "rope_theta": 1e6}, {"sliding_window": None, "rope_theta": 1e6}),
        ({"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, {"rope_theta": 5e5}),
        ({"rope_theta": None}, {"rope_theta": 10_000.0}),
        ({"head_dim": 64}, {"head_dim": 64}),
        ({"head_dim": None}, {"head_dim": 128}),
        ({"num_key_value_heads": None}, {"num_key_value_heads": 32}),
        ({"eos_token_id": [2, 7]}, {"eos_token_ids": (2, 7)}),
        ({"eos_token_id": None, "bos_token_id": None}, {"eos_token_ids": (2,), "bos_token_id": 1}),
        ({"torch_dtype": None, "dtype": "float16"}, {"dtype": "float16"}),
        ({"tie_word_embeddings": True}, {"tie_word_embeddings": True}),
        # Llama's class computes full attention whatever the file says.
        ({"architectures": ["LlamaForCausalLM"], "sliding_window": 4096}, {"sliding_window": None}),
    ],
)
def test_huggingface_fields(tmp_path: Path, changes: dict[str, object], expected: dict[str, object]) -> None:
    config = load_model_config(write(tmp_path, {**HUGGINGFACE_V01, **changes}, "config.json"))
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"sliding_window": None, "rope_theta": 1e6, "vocab_size": 32768}, {"rope_theta": 1e6, "sliding_window": None}),
        # mistral-inference's rule for files without rope_theta
        ({"sliding_window": None}, {"rope_theta": 1e6}),
        ({"sliding_window": 4096}, {"rope_theta": 1e4}),
        ({"max_seq_len": 131072}, {"max_position_embeddings": 131072}),
        ({"tied_embeddings": True}, {"tie_word_embeddings": True}),
    ],
)
def test_mistral_fields(tmp_path: Path, changes: dict[str, object], expected: dict[str, object]) -> None:
    config = load_model_config(write(tmp_path, {**MISTRAL_V01, **changes}, "params.json"))
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        (HUGGINGFACE_V01, {"architectures": ["MixtralForCausalLM"]}, "'MixtralForCausalLM'] is not supported"),
        (HUGGINGFACE_V01, {"architectures": None}, "neither architectures nor model_type"),
        (HUGGINGFACE_V01, {"architectures": None, "model_type": "mixtral"}, "model_type 'mixtral'"),
        (HUGGINGFACE_V01, {"model_type": "ministral3"}, "model_type 'ministral3'"),
        (HUGGINGFACE_V01, {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        (HUGGINGFACE_V01, {"attention_bias": True}, "attention_bias is true"),
        (HUGGINGFACE_V01, {"mlp_bias": True}, "mlp_bias is true"),
        (HUGGINGFACE_V01, {"quantization_config": {"quant_method": "awq"}}, "Quantized checkpoints"),
        (HUGGINGFACE_V01, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "Rotary scaling 'llama3'"),
        (HUGGINGFACE_V01, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "Rotary scaling 'linear'"),
        (HUGGINGFACE_V01, {"torch_dtype": "int8"}, "Weights of type 'int8'"),
        (HUGGINGFACE_V01, {"num_key_value_heads": 5}, "5 key/value heads do not divide"),
        (HUGGINGFACE_V01, {"head_dim": 7}, "head_dim is 7"),
        (HUGGINGFACE_V01, {"sliding_window": 0}, "sliding_window is 0"),
        (HUGGINGFACE_V01, {"vocab_size": 0}, "vocab_size is 0"),
        (HUGGINGFACE_V01, {"vocab_size": "many"}, "vocab_size is 'many', not a whole number"),
        (HUGGINGFACE_V01, {"eos_token_id": 10**6}, "token ids are 0 to"),
        (HUGGINGFACE_V01, {"eos_token_id": "</s>"}, "token ids are 0 to"),
        (HUGGINGFACE_V01, {"num_attention_heads": 0}, "cannot be used"),
        (HUGGINGFACE_V01, {"rope_theta": "wide"}, "rope_theta is 'wide', not a number above 0"),
        (HUGGINGFACE_V01, {"head_dim": -32}, "head_dim is -32"),
        (HUGGINGFACE_V01, {"hidden_size": 256.5}, "hidden_size is 256.5"),
        (HUGGINGFACE_V01, {"max_position_embeddings": 0}, "max_position_embeddings is 0"),
        (MISTRAL_V01, {"moe": {"num_experts": 8}}, "'moe'"),
        (MISTRAL_V01, {"quantization": {"qformat_weight": "fp8_e4m3"}}, "'quantization'"),
        (MISTRAL_V01, {"model_type": "mamba"}, "model_type 'mamba'"),
        (MISTRAL_V01, {"vision_encoder": {"hidden_size": 1024}}, "'vision_encoder'"),
        (MISTRAL_V01, {"sliding_window": [4096, None]}, "sliding_window is [4096, None]"),
    ],
)
def test_refused(tmp_path: Path, base: dict[str, object], changes: dict[str, object], message: str) -> None:
    name = "config.json" if "architectures" in base else "params.json"
    with pytest.raises(ConfigError) as e:
        load_model_config(write(tmp_path, {**base, **changes}, name))
    assert message in str(e.value)


def test_missing_field_is_named(tmp_path: Path) -> None:
    fields = {k: v for k, v in HUGGINGFACE_V01.items() if k != "num_hidden_layers"}
    with pytest.raises(ConfigError, match=r"config\.json lacks the field 'num_hidden_layers'"):
        load_model_config(write(tmp_path, fields, "config.json"))


@pytest.mark.parametrize("text", ["{", "[1]", '"MistralForCausalLM"', "null"])
def test_a_file_that_is_not_a_json_object_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"config\.json"):
        load_model_config(write(tmp_path, text, "config.json"))


def test_folder_without_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"neither config\.json"):
        load_model_config(tmp_path)
    with pytest.raises(ConfigError, match="does not exist"):
        load_model_config(tmp_path / "absent")


def test_tensor_parallel_sizes() -> None:
    for size in (1, 2, 4):
        model_config().check_tensor_parallel_size(size)
    for size in (0, 3, 8):
        with pytest.raises(ConfigError, match=rf"--tensor-parallel-size {size} .* Use one of 1, 2, 4\."):
            model_config().check_tensor_parallel_size(size)
    with pytest.raises(ConfigError, match=r"intermediate size 98 .* Use one of 1, 2\."):
        model_config(intermediate_size=98).check_tensor_parallel_size(4)


def test_steps_overlap_on_cuda_unless_an_option_says_otherwise():
    def overlaps(**settings):
        return EngineConfig(model_path="x", model=model_config(), **settings).overlaps

    assert [overlaps(device=device) for device in ("cpu", "cuda")] == [False, True]
    assert [overlaps(device="cpu", overlap=True), overlaps(device="cuda", overlap=False)] == [True, False]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tensor_parallel_size": 3}, "--tensor-parallel-size 3"),
        ({"block_size": 0}, "block_size is 0"),
        ({"num_kv_blocks": 0}, "num_kv_blocks is 0"),
        ({"max_num_batched_tokens": 8, "max_num_seqs": 16}, "is less than max_num_seqs (16)"),
        ({"gpu_memory_utilization": 0.0}, "Use a value above 0 and up to 1."),
        ({"gpu_memory_utilization": 1.5}, "Use a value above 0 and up to 1."),
        (
            {"device": "cuda", "deterministic": True, "attention_backend": "flash"},
            "--attention-backend flash is not deterministic on CUDA.",
        ),
    ],
)
def test_engine_settings_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as e:
        EngineConfig(model_path="x", model=model_config(), **changes)  # type: ignore[arg-type]
    assert message in str(e.value)


def test_deterministic_changes_nothing_on_the_cpu() -> None:
    config = EngineConfig(model_path="x", model=model_config(), deterministic=True, attention_backend="sdpa")
    assert config.deterministic


@pytest.mark.parametrize(
    ("value", "num_threads"), [("3", 3), ("4,2", 4), (" 1 ", 1), ("", None), ("0", None), ("many", None), (None, None)]
)
def test_the_number_of_threads_is_what_openmp_is_told(value, num_threads):
    assert requested_num_threads({} if value is None else {"OMP_NUM_THREADS": value}) == num_threads
