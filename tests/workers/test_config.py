"""Both layouts' configuration files, read and refused."""

import json
import math
from pathlib import Path

import pytest

from workers.checkpoint.model_config import load_model_config
from workers.config import EngineConfig, ModelConfig, requested_num_threads
from workers.errors import ConfigError
from workers.rope import QueryScaling, RopeScaling

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
        ({"vision_encoder": {"hidden_size": 1024}}, {"has_vision": True}),
        ({"multimodal": {"vision_encoder_args": {"hidden_size": 1024}}}, {"has_vision": True}),
        # Ministral 8B
        ({"sliding_window": [None, 512, 512, 512]}, {"sliding_window": (None, 512, 512, 512) * 8, "rope_theta": 1e4}),
        ({"sliding_window": [512, 512]}, {"sliding_window": 512}),
        # Ministral 3
        (
            {
                "yarn": {
                    "factor": 16,
                    "original_max_position_embeddings": 16384,
                    "beta": 8.0,
                    "alpha": 2,
                    "apply_scale": False,
                },
                "llama_4_scaling": {"beta": 0.1, "original_max_position_embeddings": 16384},
            },
            {
                "rope_scaling": RopeScaling(
                    rope_type="yarn", factor=16, original_max_position_embeddings=16384, beta_fast=8, beta_slow=2
                ),
                "query_scaling": QueryScaling(beta=0.1, original_max_position_embeddings=16384),
            },
        ),
        (
            {"yarn": {"factor": 4.0, "original_max_position_embeddings": 64}},
            {
                "rope_scaling": RopeScaling(
                    rope_type="yarn",
                    factor=4.0,
                    original_max_position_embeddings=64,
                    attention_factor=1 + 0.1 * math.log(4),
                )
            },
        ),
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
        (HUGGINGFACE_V01, {"model_type": "qwen3"}, "model_type 'qwen3'"),
        (HUGGINGFACE_V01, {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        (HUGGINGFACE_V01, {"attention_bias": True}, "attention_bias is True, but MistralForCausalLM"),
        (HUGGINGFACE_V01, {"mlp_bias": True}, "mlp_bias is True, but MistralForCausalLM"),
        (HUGGINGFACE_V01, {"quantization_config": {"quant_method": "hqq"}}, "quantized by 'hqq'"),
        (HUGGINGFACE_V01, {"rope_scaling": {"rope_type": "longrope", "factor": 8.0}}, "Rotary scaling 'longrope'"),
        (HUGGINGFACE_V01, {"rope_scaling": {"type": "linear"}}, "lacks the field 'factor'"),
        (HUGGINGFACE_V01, {"torch_dtype": "int8"}, "Weights of type 'int8'"),
        (HUGGINGFACE_V01, {"num_key_value_heads": 5}, "5 key/value heads do not divide"),
        (HUGGINGFACE_V01, {"head_dim": 7}, "head_dim is 7"),
        (HUGGINGFACE_V01, {"sliding_window": 0}, "sliding_window is 0"),
        (HUGGINGFACE_V01, {"vocab_size": 0}, "vocab_size is 0"),
        (HUGGINGFACE_V01, {"vocab_size": "many"}, "vocab_size is 'many', not a whole number"),
        (HUGGINGFACE_V01, {"eos_token_id": 10**6}, "token ids are 0 to"),
        (HUGGINGFACE_V01, {"eos_token_id": "</s>"}, "token ids are 0 to"),
        (HUGGINGFACE_V01, {"num_attention_heads": 0}, "num_attention_heads is 0, not a whole number"),
        (HUGGINGFACE_V01, {"rope_theta": "wide"}, "rope_theta is 'wide', not a number above 0"),
        (HUGGINGFACE_V01, {"head_dim": -32}, "head_dim is -32"),
        (HUGGINGFACE_V01, {"hidden_size": 256.5}, "hidden_size is 256.5"),
        (HUGGINGFACE_V01, {"max_position_embeddings": 0}, "max_position_embeddings is 0"),
        (MISTRAL_V01, {"moe": {"num_experts": 8}}, "'moe'"),
        (MISTRAL_V01, {"quantization": {"qformat_weight": "fp8_e5m2"}}, "weights of the format 'fp8_e5m2'"),
        (MISTRAL_V01, {"quantization": {"qformat_weight": "fp8_e4m3", "qscheme_act": "ROW"}}, "by the scheme 'ROW'"),
        (MISTRAL_V01, {"model_type": "mamba"}, "model_type 'mamba'"),
        (MISTRAL_V01, {"multimodal": {"whisper_model_args": {}}}, "multimodal {'whisper_model_args': {}}"),
        (MISTRAL_V01, {"use_scaled_rope": True}, "'use_scaled_rope'"),
        (MISTRAL_V01, {"yarn": {"factor": 4, "beta": 32, "gamma": 1}}, "yarn has 'gamma'"),
        (MISTRAL_V01, {"sliding_window": [4096] * 5}, "a pattern of 5 layers, which 32 layers do not repeat"),
        (MISTRAL_V01, {"sliding_window": [None, 0]}, "sliding_window is 0"),
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
    """8 query and 4 key/value heads: on 8 ranks, two have the same key/value head."""
    for size in (1, 2, 4, 8):
        model_config().check_tensor_parallel_size(size)
    for size in (-1, 0, 3, 16):
        with pytest.raises(ConfigError, match=rf"size {size} .* 8 attention heads do not .* Use one of 1, 2, 4, 8\."):
            model_config().check_tensor_parallel_size(size)
    model_config(intermediate_size=98).check_tensor_parallel_size(4)
    with pytest.raises(ConfigError, match=r"intermediate size 3 is less than the number of ranks\. Use one of 1, 2\."):
        model_config(intermediate_size=3).check_tensor_parallel_size(4)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "sizes"),
    [(9, 3, (1, 3, 9)), (8, 2, (1, 2, 4, 8)), (32, 8, (1, 2, 4, 8, 16, 32)), (5, 1, (1, 5))],
)
def test_ranks_divide_the_query_heads_and_share_key_value_heads(
    heads: int, kv_heads: int, sizes: tuple[int, ...]
) -> None:
    model = model_config(num_attention_heads=heads, num_key_value_heads=kv_heads, intermediate_size=360 * 64)
    assert model.tensor_parallel_sizes == sizes
    assert [model.kv_heads_per_rank(n) for n in sizes] == [max(1, kv_heads // n) for n in sizes]


def test_ranks_whose_query_heads_read_parts_of_key_value_heads_have_them_more_than_once() -> None:
    """12 query and 6 key/value heads on 4 ranks: rank 0 reads 0, 0 and 1 for its three query heads."""
    model = model_config(num_attention_heads=12, num_key_value_heads=6)
    assert model.tensor_parallel_sizes == (1, 2, 3, 4, 6, 12)
    assert [model.kv_heads_per_rank(n) for n in model.tensor_parallel_sizes] == [6, 3, 2, 3, 1, 1]


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
        (
            {"device": "cuda", "kv_cache_dtype": "fp8", "attention_backend": "flash"},
            "--attention-backend flash does not read keys and values in fp8.",
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
