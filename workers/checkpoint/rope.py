"""The rotary embedding that a configuration asks for: its base and its scaling. What cannot be computed is refused by name.

Knows the fields' order of precedence in transformers (a nested rope_theta wins over the top-level one) and the fields of params.json.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from workers.checkpoint.numbers import decimal, flag, whole
from workers.checkpoint.regular_file import shown
from workers.errors import ConfigError
from workers.rope import ROPE_TYPES, QueryScaling, RopeScaling

DEFAULT_THETA = 10_000.0


@dataclass(frozen=True, kw_only=True)
class Rope:
    """As the fields of ModelConfig."""

    theta: float
    scaling: RopeScaling | None = None
    query_scaling: QueryScaling | None = None


def read_rope(fields: Mapping[str, Any]) -> Rope:
    """Of config.json. Raises ConfigError for another kind, for partial and for per-layer rotary embedding."""
    # In transformers 5 an old checkpoint's rope_scaling replaces rope_parameters.
    param = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    rope = fields.get(param) or {}
    if not isinstance(rope, dict):
        raise ConfigError(f"{param} is {shown(rope)}, not a JSON object.", remedy="Correct it.", param=param)
    if nested := [name for name, value in rope.items() if isinstance(value, dict)]:
        raise ConfigError(
            f"{param} has its own settings for {nested[0]!r} layers, which is not supported.",
            remedy="Use a checkpoint with the same rotary embedding in all layers.",
            param=param,
        )
    partial = rope.get("partial_rotary_factor", fields.get("partial_rotary_factor"))
    if partial is not None and partial != 1:
        raise ConfigError(
            f"partial_rotary_factor {shown(partial)} is not supported.",
            remedy="Use a checkpoint that rotates all of a head.",
            param="partial_rotary_factor",
        )
    nested_theta = rope.get("rope_theta")
    theta = fields.get("rope_theta") if nested_theta is None else nested_theta
    original = fields.get("original_max_position_embeddings", rope.get("original_max_position_embeddings"))
    if original is None:
        original = fields["max_position_embeddings"]
    beta = rope.get("llama_4_scaling_beta") if fields.get("model_type") == "ministral3" else None
    return Rope(
        theta=decimal("rope_theta", DEFAULT_THETA if theta is None else theta),
        scaling=_scaling(rope, original, fields["max_position_embeddings"], param=param),
        query_scaling=None if beta is None else _query_scaling(beta, original),
    )


def read_params_rope(fields: Mapping[str, Any], *, default_theta: float) -> Rope:
    """Of params.json: `yarn` {"factor", "original_max_position_embeddings", "beta", "alpha", "apply_scale"} and `llama_4_scaling`."""
    theta, yarn, llama_4 = fields.get("rope_theta"), fields.get("yarn"), fields.get("llama_4_scaling")
    for name, value in (("yarn", yarn), ("llama_4_scaling", llama_4)):
        if value and not isinstance(value, dict):
            raise ConfigError(f"{name} is {shown(value)}, not a JSON object.", remedy="Correct it.", param=name)
    scaling = None
    if yarn:
        if unknown := yarn.keys() - {"factor", "original_max_position_embeddings", "beta", "alpha", "apply_scale"}:
            raise ConfigError(f"yarn has {min(unknown)!r}, which is not supported.", remedy="Correct it.", param="yarn")
        rope = {
            "rope_type": "yarn",
            "factor": yarn["factor"],
            "beta_fast": yarn.get("beta"),
            "beta_slow": yarn.get("alpha"),
            # Without it, the scores are as large as the factor asks for.
            "attention_factor": None if flag("apply_scale", yarn.get("apply_scale", True)) else 1.0,
        }
        scaling = _scaling(rope, yarn["original_max_position_embeddings"], None, param="yarn")
    return Rope(
        theta=decimal("rope_theta", default_theta if theta is None else theta),
        scaling=scaling,
        query_scaling=_query_scaling(llama_4["beta"], llama_4["original_max_position_embeddings"]) if llama_4 else None,
    )


def _scaling(rope: Mapping[str, Any], original: Any, longest: Any, *, param: str) -> RopeScaling | None:
    """original, longest: the contexts before and after it, in tokens. A factor that is null is their ratio, as in transformers."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind not in ROPE_TYPES:
        raise ConfigError(
            f"Rotary scaling {shown(kind)} is not supported.",
            remedy=f"Use a checkpoint with {', '.join(ROPE_TYPES[:-1])} or {ROPE_TYPES[-1]} scaling, or without any.",
            param=param,
        )
    if kind == "linear":
        return RopeScaling(rope_type="linear", factor=_factor(rope["factor"]))
    original = whole("original_max_position_embeddings", original)
    if kind == "llama3":
        low, high = (decimal(name, rope[name]) for name in ("low_freq_factor", "high_freq_factor"))
        if low >= high:
            raise ConfigError(
                f"{param} has low_freq_factor {low:g}, which is not below its high_freq_factor {high:g}.",
                remedy="Correct it.",
                param=param,
            )
        return RopeScaling(
            rope_type="llama3",
            factor=_factor(rope["factor"]),
            original_max_position_embeddings=original,
            low_freq_factor=low,
            high_freq_factor=high,
        )
    factor = rope.get("factor")
    factor = longest / original if factor is None else _factor(factor)
    attention_factor = rope.get("attention_factor")
    return RopeScaling(
        rope_type="yarn",
        factor=factor,
        original_max_position_embeddings=original,
        beta_fast=decimal("beta_fast", rope.get("beta_fast") or RopeScaling.beta_fast),
        beta_slow=decimal("beta_slow", rope.get("beta_slow") or RopeScaling.beta_slow),
        truncate=flag("truncate", rope.get("truncate", True)),
        attention_factor=_yarn_attention(rope, factor)
        if attention_factor is None
        else decimal("attention_factor", attention_factor),
    )


def _yarn_attention(rope: Mapping[str, Any], factor: float) -> float:
    """How much more cosines and sines are, where the file does not say. With both mscale values, their ratio as in DeepSeek's models."""

    def magnitude(scale: float = 1.0) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    mscale, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    if mscale and all_dim:
        return magnitude(decimal("mscale", mscale)) / magnitude(decimal("mscale_all_dim", all_dim))
    return magnitude()


def _query_scaling(beta: Any, original: Any) -> QueryScaling:
    return QueryScaling(
        beta=decimal("llama_4_scaling beta", beta),
        original_max_position_embeddings=whole("original_max_position_embeddings", original),
    )


def _factor(value: Any) -> float:
    return decimal("rotary scaling factor", value)
