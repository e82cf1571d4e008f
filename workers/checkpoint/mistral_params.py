"""params.json of Mistral's own layout as a ModelConfig. Knows fields; no files and no tensors. Its end token is always 2."""

from typing import Any

from workers.checkpoint.numbers import decimal, flag
from workers.checkpoint.regular_file import shown
from workers.config import ModelConfig
from workers.errors import ConfigError


def model_from_params_json(fields: dict[str, Any]) -> ModelConfig:
    """Raises ConfigError, and KeyError for a missing field."""
    if fields.get("model_type", "transformer") != "transformer":
        raise ConfigError(
            f"model_type {shown(fields['model_type'])} is not supported.",
            remedy="Use a checkpoint whose model_type is 'transformer'.",
            param="model_type",
        )
    for name in ("moe", "quantization", "lora", "vision_encoder", "yarn", "rope_scaling"):
        if fields.get(name):
            raise ConfigError(
                f"params.json has {name!r}, which is not supported.",
                remedy="Use a dense, unquantized checkpoint.",
                param=name,
            )
    heads = fields["n_heads"]
    window = fields.get("sliding_window")
    kv_heads, head_dim, theta = fields.get("n_kv_heads"), fields.get("head_dim"), fields.get("rope_theta")
    if theta is None:
        # mistral-inference's rule: 10,000 for v0.1, which has a window, 1,000,000 for later versions.
        theta = 1_000_000.0 if window is None else 10_000.0
    return ModelConfig(
        vocab_size=fields["vocab_size"],
        hidden_size=fields["dim"],
        intermediate_size=fields["hidden_dim"],
        num_hidden_layers=fields["n_layers"],
        num_attention_heads=heads,
        num_key_value_heads=heads if kv_heads is None else kv_heads,
        head_dim=fields["dim"] // heads if head_dim is None else head_dim,
        rms_norm_eps=decimal("norm_eps", fields.get("norm_eps", 1e-5)),
        rope_theta=decimal("rope_theta", theta),
        sliding_window=window,
        max_position_embeddings=fields.get("max_seq_len") or fields.get("max_position_embeddings") or 32_768,
        tie_word_embeddings=flag("tied_embeddings", fields.get("tied_embeddings")),
        bos_token_id=1,
        eos_token_ids=(2,),
        dtype="bfloat16",
        layout="mistral",
    )
