"""params.json of Mistral's own layout as a ModelConfig. Knows fields; no files and no tensors. Its end token is always 2."""

from typing import Any

from workers.checkpoint.numbers import decimal, flag, head_size, layer_windows
from workers.checkpoint.quantization import read_params_quantization
from workers.checkpoint.regular_file import shown
from workers.checkpoint.rope import read_params_rope
from workers.config import ModelConfig
from workers.errors import ConfigError

NOT_SUPPORTED = ("moe", "lora", "rope_scaling", "use_scaled_rope", "q_lora_rank", "kv_lora_rank")


def model_from_params_json(fields: dict[str, Any]) -> ModelConfig:
    """Raises ConfigError, and KeyError for a missing field."""
    if fields.get("model_type", "transformer") != "transformer":
        raise ConfigError(
            f"model_type {shown(fields['model_type'])} is not supported.",
            remedy="Use a checkpoint whose model_type is 'transformer'.",
            param="model_type",
        )
    for name in NOT_SUPPORTED:
        if fields.get(name):
            raise ConfigError(
                f"params.json has {name!r}, which is not supported.",
                remedy="Use a dense checkpoint.",
                param=name,
            )
    multimodal = fields.get("multimodal") or {}
    if not isinstance(multimodal, dict) or multimodal.keys() - {"vision_encoder_args"}:
        raise ConfigError(
            f"params.json has multimodal {shown(multimodal)}, which is not supported.",
            remedy="Use a checkpoint whose only other input is images, which are left out.",
            param="multimodal",
        )
    heads = fields["n_heads"]
    window = _window(fields.get("sliding_window"), fields["n_layers"])
    kv_heads, head_dim = fields.get("n_kv_heads"), fields.get("head_dim")
    # mistral-inference's rule: 10,000 for v0.1, which has a window, 1,000,000 for later versions.
    rope = read_params_rope(fields, default_theta=1_000_000.0 if window is None else 10_000.0)
    return ModelConfig(
        vocab_size=fields["vocab_size"],
        hidden_size=fields["dim"],
        intermediate_size=fields["hidden_dim"],
        num_hidden_layers=fields["n_layers"],
        num_attention_heads=heads,
        num_key_value_heads=heads if kv_heads is None else kv_heads,
        head_dim=head_size(fields["dim"], heads) if head_dim is None else head_dim,
        rms_norm_eps=decimal("norm_eps", fields.get("norm_eps", 1e-5)),
        rope_theta=rope.theta,
        rope_scaling=rope.scaling,
        query_scaling=rope.query_scaling,
        sliding_window=window,
        max_position_embeddings=fields.get("max_seq_len") or fields.get("max_position_embeddings") or 32_768,
        tie_word_embeddings=flag("tied_embeddings", fields.get("tied_embeddings")),
        bos_token_id=1,
        eos_token_ids=(2,),
        dtype="bfloat16",
        layout="mistral",
        has_vision=bool(fields.get("vision_encoder") or multimodal),
        stored=read_params_quantization(fields),
    )


def _window(window: Any, num_layers: Any) -> Any:
    """A list is a pattern that the layers repeat: [null, 32768, 32768, 32768] in 36 layers gives nine of them full attention."""
    if not isinstance(window, list):
        return window
    if not window or type(num_layers) is not int or num_layers < 1 or num_layers % len(window):
        raise ConfigError(
            f"sliding_window {shown(window)} is a pattern of {len(window)} layers, which {shown(num_layers)} layers do not repeat.",
            remedy="Correct it.",
            param="sliding_window",
        )
    return layer_windows(window * (num_layers // len(window)))
