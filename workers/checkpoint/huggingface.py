"""config.json of Hugging Face's layout as a ModelConfig. A missing field means what transformers' configuration of that model_type says.

Knows fields; no files and no tensors.
"""

from typing import Any

from workers.checkpoint.numbers import decimal, distinct, flag, head_size, layer_windows, token_ids
from workers.checkpoint.quantization import read_quantization
from workers.checkpoint.regular_file import shown
from workers.checkpoint.rope import read_rope
from workers.config import Dtype, ModelConfig
from workers.errors import ConfigError

ARCHITECTURES = {
    "mistral": "MistralForCausalLM",
    "llama": "LlamaForCausalLM",
    "ministral": "MinistralForCausalLM",
    "ministral3": "Ministral3ForCausalLM",
    # Its text_config is one of the others.
    "mistral3": "Mistral3ForConditionalGeneration",
}
_MISTRAL = {
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "sliding_window": 4096,
    "rms_norm_eps": 1e-6,
}
# The fields that old or hand-made files lack. A file without the others is not a configuration of a model.
DEFAULTS: dict[str, dict[str, Any]] = {
    "mistral": _MISTRAL,
    "ministral": _MISTRAL,
    "ministral3": {
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 262_144,
        "sliding_window": None,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 16.0,
            "original_max_position_embeddings": 16_384,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    },
    "llama": {
        "num_key_value_heads": None,
        "max_position_embeddings": 2048,
        "sliding_window": None,
        "rms_norm_eps": 1e-6,
    },
}
# Fields of a model with an encoder of images that may stand beside its text_config.
OUTER_FIELDS = ("tie_word_embeddings", "bos_token_id", "eos_token_id", "dtype", "torch_dtype")
DEFAULT_EOS = 2


def model_from_config_json(fields: dict[str, Any], *, generation: dict[str, Any]) -> ModelConfig:
    """generation: the fields of generation_config.json. Raises ConfigError, and KeyError for a missing field."""
    fields, has_vision = _text_fields(fields)
    model_type = _model_type(fields)
    stored = read_quantization(fields)
    if fields.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ConfigError(
            f"hidden_act {shown(fields['hidden_act'])} is not supported.",
            remedy="Use a checkpoint whose hidden_act is 'silu'.",
            param="hidden_act",
        )
    for name in ("attention_bias", "mlp_bias"):
        if fields.get(name) and model_type != "llama":
            raise ConfigError(
                f"{name} is {shown(fields[name])}, but {ARCHITECTURES[model_type]} has no biases.",
                remedy="Correct it, or use a checkpoint of LlamaForCausalLM.",
                param=name,
            )
    # Of Ministral 3's rope_parameters, null means the default too.
    given = {name: value for name, value in fields.items() if value is not None or name != "rope_parameters"}
    fields = DEFAULTS[model_type] | given | {"model_type": model_type}
    heads = fields["num_attention_heads"]
    kv_heads, head_dim = fields["num_key_value_heads"], fields.get("head_dim")
    vocab_size = fields["vocab_size"]
    eos = token_ids(fields.get("eos_token_id", DEFAULT_EOS))
    # Both files count. A token of generation_config.json that the model does not have can end nothing.
    more = [i for i in token_ids(generation.get("eos_token_id")) if type(i) is int and 0 <= i < vocab_size]
    rope = read_rope(fields)
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=fields["hidden_size"],
        intermediate_size=fields["intermediate_size"],
        num_hidden_layers=fields["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=heads if kv_heads is None else kv_heads,
        head_dim=head_size(fields["hidden_size"], heads) if head_dim is None else head_dim,
        rms_norm_eps=decimal("rms_norm_eps", fields["rms_norm_eps"]),
        rope_theta=rope.theta,
        rope_scaling=rope.scaling,
        query_scaling=rope.query_scaling,
        sliding_window=_window(fields, model_type),
        max_position_embeddings=fields["max_position_embeddings"],
        tie_word_embeddings=flag("tie_word_embeddings", fields.get("tie_word_embeddings")),
        attention_bias=flag("attention_bias", fields.get("attention_bias")),
        mlp_bias=flag("mlp_bias", fields.get("mlp_bias")),
        bos_token_id=1 if fields.get("bos_token_id") is None else fields["bos_token_id"],
        eos_token_ids=distinct([*eos, *more]) or (DEFAULT_EOS,),
        dtype=_dtype(fields.get("dtype") or fields.get("torch_dtype") or "bfloat16"),
        layout="huggingface",
        has_vision=has_vision,
        stored=stored,
    )


def _text_fields(fields: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """The fields of the language model, and whether the checkpoint has an encoder of images beside it."""
    text, architectures = fields.get("text_config"), _architectures(fields)
    name = ARCHITECTURES["mistral3"]
    if fields.get("model_type") != "mistral3" and name not in architectures:
        return fields, False
    if not isinstance(text, dict):
        raise ConfigError(
            f"config.json is of {name}, but its text_config is {shown(text)}, not a JSON object.",
            remedy="Download it again.",
            param="text_config",
        )
    outer = {name: fields[name] for name in (*OUTER_FIELDS, "quantization_config") if fields.get(name) is not None}
    return {"model_type": "mistral"} | text | outer, True


def _architectures(fields: dict[str, Any]) -> list[Any]:
    architectures = fields.get("architectures")
    return architectures if isinstance(architectures, list) else [] if architectures is None else [architectures]


def _model_type(fields: dict[str, Any]) -> str:
    """As in transformers, model_type decides; a file without it has an architecture."""
    model_type, names = fields.get("model_type"), _architectures(fields)
    if names and not any(name in ARCHITECTURES.values() for name in names):
        raise _not_supported(f"Architecture {shown(fields['architectures'])} is not supported.", param="architectures")
    if model_type is None:
        model_type = next((kind for kind, name in ARCHITECTURES.items() if name in names), None)
    if not isinstance(model_type, str) or model_type not in DEFAULTS:
        what = (
            "has neither architectures nor model_type" if model_type is None else f"has model_type {shown(model_type)}"
        )
        raise _not_supported(f"config.json {what}, which is not supported.", param="model_type")
    return model_type


def _not_supported(message: str, *, param: str) -> ConfigError:
    names = list(ARCHITECTURES.values())
    listed = f"{', '.join(names[:-1])} or {names[-1]} (its language model)"
    return ConfigError(message, remedy=f"Use a checkpoint of {listed}.", param=param)


def _window(fields: dict[str, Any], model_type: str) -> Any:
    """The window of all layers, None for full attention; a tuple if layer_types gives the layers different ones.

    transformers' AutoModel computes a Mistral checkpoint with layer_types as Ministral, a Ministral 3 checkpoint with one window for all
    layers, and a Llama checkpoint always with full attention.
    """
    window, layer_types = fields["sliding_window"], fields.get("layer_types")
    num_layers = fields["num_hidden_layers"]
    if layer_types is None:
        return None if model_type == "llama" else window
    kinds = ("full_attention", "sliding_attention")
    if not isinstance(layer_types, list) or len(layer_types) != num_layers or not all(t in kinds for t in layer_types):
        raise ConfigError(
            f"layer_types is {shown(layer_types)}, which does not say full_attention or sliding_attention for each of "
            f"{shown(num_layers)} layers.",
            remedy="Correct it, or use another checkpoint.",
            param="layer_types",
        )
    if model_type in ("llama", "ministral3") and "sliding_attention" in layer_types and window is not None:
        raise ConfigError(
            f"layer_types {shown(layer_types)} gives layers a window of their own, which {ARCHITECTURES[model_type]} does not have.",
            remedy="Use a checkpoint of MinistralForCausalLM, or remove layer_types.",
            param="layer_types",
        )
    return layer_windows([window if kind == "sliding_attention" else None for kind in layer_types])


def _dtype(name: object) -> Dtype:
    name = str(name).removeprefix("torch.")
    if name not in ("float32", "bfloat16", "float16"):
        raise ConfigError(
            f"Weights of type {shown(name)} are not supported.",
            remedy="Use float32, float16 or bfloat16 weights.",
            param="dtype",
        )
    return name  # type: ignore[return-value]
