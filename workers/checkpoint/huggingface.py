"""config.json of Hugging Face's layout as a ModelConfig. A missing field means what transformers' MistralConfig and LlamaConfig say.

Knows fields; no files and no tensors.
"""

from typing import Any

from workers.checkpoint.numbers import decimal, flag, token_ids
from workers.checkpoint.regular_file import shown
from workers.checkpoint.rope import rope_theta
from workers.config import Dtype, ModelConfig
from workers.errors import ConfigError

ARCHITECTURES = {"mistral": "MistralForCausalLM", "llama": "LlamaForCausalLM"}
# The fields that old or hand-made files lack. A file without the others is not a configuration of a model.
DEFAULTS: dict[str, dict[str, Any]] = {
    "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 131_072, "sliding_window": 4096},
    "llama": {"num_key_value_heads": None, "max_position_embeddings": 2048, "sliding_window": None},
}
DEFAULT_EPS = 1e-6
DEFAULT_EOS = 2


def model_from_config_json(fields: dict[str, Any], *, generation: dict[str, Any]) -> ModelConfig:
    """generation: the fields of generation_config.json. Raises ConfigError, and KeyError for a missing field."""
    model_type = _model_type(fields)
    check_quantization(fields)
    if fields.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ConfigError(
            f"hidden_act {shown(fields['hidden_act'])} is not supported.",
            remedy="Use a checkpoint whose hidden_act is 'silu'.",
            param="hidden_act",
        )
    for name in ("attention_bias", "mlp_bias"):
        if fields.get(name):
            raise ConfigError(
                f"{name} is true, but checkpoints with biases are not supported.",
                remedy="Use a checkpoint without biases.",
                param=name,
            )
    fields = DEFAULTS[model_type] | fields
    heads = fields["num_attention_heads"]
    kv_heads, head_dim = fields["num_key_value_heads"], fields.get("head_dim")
    window = _window(fields, model_type)
    vocab_size = fields["vocab_size"]
    eos = token_ids(fields.get("eos_token_id", DEFAULT_EOS))
    # Both files count. A token of generation_config.json that the model does not have can end nothing.
    more = [i for i in token_ids(generation.get("eos_token_id")) if type(i) is int and 0 <= i < vocab_size]
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=fields["hidden_size"],
        intermediate_size=fields["intermediate_size"],
        num_hidden_layers=fields["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=heads if kv_heads is None else kv_heads,
        head_dim=fields["hidden_size"] // heads if head_dim is None else head_dim,
        rms_norm_eps=decimal("rms_norm_eps", fields.get("rms_norm_eps", DEFAULT_EPS)),
        rope_theta=decimal("rope_theta", rope_theta(fields)),
        sliding_window=window,
        max_position_embeddings=fields["max_position_embeddings"],
        tie_word_embeddings=flag("tie_word_embeddings", fields.get("tie_word_embeddings")),
        bos_token_id=1 if fields.get("bos_token_id") is None else fields["bos_token_id"],
        eos_token_ids=tuple(dict.fromkeys([*eos, *more])) or (DEFAULT_EOS,),
        dtype=_dtype(fields.get("dtype") or fields.get("torch_dtype") or "bfloat16"),
        layout="huggingface",
    )


def check_quantization(fields: dict[str, Any]) -> None:
    """Raises ConfigError for a checkpoint of GPTQ, AWQ, bitsandbytes or another method."""
    quantization = fields.get("quantization_config") or fields.get("compression_config")
    if not quantization:
        return
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    raise ConfigError(
        f"Quantized checkpoints{f' ({shown(method)})' if method else ''} are not supported.",
        remedy="Use the float32, float16 or bfloat16 weights.",
        param="quantization_config",
    )


def _model_type(fields: dict[str, Any]) -> str:
    """As in transformers, model_type decides; a file without it has an architecture."""
    model_type, architectures = fields.get("model_type"), fields.get("architectures")
    names = architectures if isinstance(architectures, list) else [] if architectures is None else [architectures]
    if names and not any(name in ARCHITECTURES.values() for name in names):
        raise ConfigError(
            f"Architecture {shown(architectures)} is not supported.",
            remedy=f"Use a checkpoint of {' or '.join(ARCHITECTURES.values())}.",
            param="architectures",
        )
    if model_type is None:
        model_type = next((kind for kind, name in ARCHITECTURES.items() if name in names), None)
    if model_type not in ("mistral", "llama"):
        what = (
            "has neither architectures nor model_type" if model_type is None else f"has model_type {shown(model_type)}"
        )
        raise ConfigError(
            f"config.json {what}, which is not supported.",
            remedy=f"Use a checkpoint of {' or '.join(ARCHITECTURES.values())}.",
            param="model_type",
        )
    return str(model_type)


def _window(fields: dict[str, Any], model_type: str) -> Any:
    """The window of all layers, None for full attention. Raises ConfigError if layer_types gives the layers different ones.

    transformers computes a Mistral checkpoint with layer_types as Ministral, and a Llama checkpoint always with full attention.
    """
    window, layer_types = fields["sliding_window"], fields.get("layer_types")
    kinds = set(map(str, layer_types)) if isinstance(layer_types, list) else {str(layer_types or "sliding_attention")}
    if window is None or kinds == {"full_attention"}:
        return None
    if layer_types is not None and (kinds != {"sliding_attention"} or model_type == "llama"):
        raise ConfigError(
            f"layer_types {shown(layer_types)} gives layers a window of their own, which is not supported.",
            remedy="Use a checkpoint whose layers all have the same attention.",
            param="layer_types",
        )
    return window if model_type == "mistral" else None


def _dtype(name: object) -> Dtype:
    name = str(name).removeprefix("torch.")
    if name not in ("float32", "bfloat16", "float16"):
        raise ConfigError(
            f"Weights of type {shown(name)} are not supported.",
            remedy="Use float32, float16 or bfloat16 weights.",
            param="dtype",
        )
    return name  # type: ignore[return-value]
