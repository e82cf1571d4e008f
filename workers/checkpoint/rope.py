"""The rotary embedding that a Hugging Face configuration asks for: one base for all layers, without scaling; all else is refused by name.

Knows the fields' order of precedence in transformers: a nested rope_theta wins over the top-level one.
"""

from typing import Any

from workers.checkpoint.regular_file import shown
from workers.errors import ConfigError

DEFAULT_THETA = 10_000.0


def rope_theta(fields: dict[str, Any]) -> Any:
    """The base; not checked to be a number. Raises ConfigError for scaled, partial or per-layer rotary embedding."""
    # In transformers 5 an old checkpoint's rope_scaling replaces rope_parameters.
    param = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    rope = fields.get(param) or {}
    if not isinstance(rope, dict):
        raise ConfigError(f"{param} is {shown(rope)}, not a JSON object.", remedy="Correct it.", param=param)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ConfigError(
            f"Rotary scaling {shown(kind)} is not supported.",
            remedy="Use a checkpoint with unscaled rotary embedding.",
            param=param,
        )
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
    return DEFAULT_THETA if theta is None else theta
