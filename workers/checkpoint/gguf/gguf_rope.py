"""The rotary embedding that a GGUF file asks for, as llama.cpp computes it: its base and its scaling. Knows keys; no files.

llama3 scaling is not in the metadata: the converter leaves a tensor `rope_freqs` with the factors by which frequencies are divided.
"""

import math
from collections.abc import Sequence

from workers.checkpoint.gguf.gguf_fields import Fields
from workers.checkpoint.numbers import whole
from workers.checkpoint.regular_file import shown
from workers.checkpoint.rope import DEFAULT_THETA, Rope
from workers.errors import ConfigError
from workers.rope import QueryScaling, RopeScaling


def read_gguf_rope(model: Fields, *, factors: Sequence[float] | None) -> Rope:
    """factors: of the tensor `rope_freqs`. Raises ConfigError for scaling of another kind."""
    kind = model.get("rope.scaling.type")
    scaling = None
    if factors is not None:
        scaling = RopeScaling(rope_type="factors", factor=1.0, factors=tuple(factors))
    if kind == "linear":
        scaling = RopeScaling(rope_type="linear", factor=model.number("rope.scaling.factor"))
    elif kind == "yarn":
        scaling = _yarn(model)
    elif kind not in (None, "none"):
        raise ConfigError(
            f"The GGUF file's rotary scaling {shown(kind)} is not supported.",
            remedy="Use a model with linear, llama3 or yarn scaling, or without any.",
            param=model.key("rope.scaling.type"),
        )
    if factors is not None and kind not in (None, "none"):
        raise ConfigError(
            f"The GGUF file has both {kind} rotary scaling and factors for each frequency, which is not supported.",
            remedy="Use a model with one of them.",
            param=model.key("rope.scaling.type"),
        )
    beta = model.get("attention.temperature_scale")
    query_scaling = None
    if beta:
        original = _original_context(model)
        query_scaling = QueryScaling(
            beta=model.number("attention.temperature_scale"), original_max_position_embeddings=original
        )
    return Rope(
        theta=model.number("rope.freq_base", default=DEFAULT_THETA), scaling=scaling, query_scaling=query_scaling
    )


def _original_context(model: Fields) -> int:
    name = "rope.scaling.original_context_length"
    return whole(model.key(name), model.whole(name))


def _yarn(model: Fields) -> RopeScaling:
    factor = model.number("rope.scaling.factor")

    def magnitude(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    # Keys and queries are magnified by the logarithm of the factor, which this multiplier takes back where the model was trained so.
    log_multiplier = model.get("rope.scaling.yarn_log_multiplier")
    attention = magnitude(1.0) / (
        magnitude(model.number("rope.scaling.yarn_log_multiplier")) if log_multiplier else 1.0
    )
    return RopeScaling(
        rope_type="yarn",
        factor=factor,
        original_max_position_embeddings=_original_context(model),
        beta_fast=model.number("rope.scaling.yarn_beta_fast", default=RopeScaling.beta_fast),
        beta_slow=model.number("rope.scaling.yarn_beta_slow", default=RopeScaling.beta_slow),
        attention_factor=attention * model.number("rope.scaling.attn_factor", default=1.0),
    )
