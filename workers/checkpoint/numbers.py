"""Values from a checkpoint's JSON as the types that ModelConfig has. Strangers write these files, so nothing is converted silently."""

import math
from collections.abc import Sequence
from typing import Any

from workers.checkpoint.regular_file import shown
from workers.errors import ConfigError

MAX_WHOLE = 1 << 40


def decimal(name: str, value: Any) -> float:
    """A finite number above 0. Strings and booleans are none. Raises ConfigError."""
    try:
        if type(value) in (int, float) and value > 0 and math.isfinite(number := float(value)):
            return number
    except OverflowError:
        pass
    raise ConfigError(
        f"The checkpoint's {name} is {shown(value)}, not a number above 0.", remedy="Correct it.", param=name
    )


def whole(name: str, value: Any) -> int:
    """A whole number above 0. Raises ConfigError."""
    if type(value) is int and 0 < value < MAX_WHOLE:
        return value
    raise ConfigError(
        f"The checkpoint's {name} is {shown(value)}, not a whole number above 0.", remedy="Correct it.", param=name
    )


def flag(name: str, value: Any) -> bool:
    """true or false; null and a missing field are false. Raises ConfigError."""
    if value is None or isinstance(value, bool):
        return bool(value)
    raise ConfigError(
        f"The checkpoint's {name} is {shown(value)}, neither true nor false.", remedy="Correct it.", param=name
    )


def layer_windows(windows: Sequence[Any]) -> Any:
    """A sliding window for each layer as ModelConfig has it, which checks them: one value where all are the same."""
    return windows[0] if all(window == windows[0] for window in windows) else tuple(windows)


def head_size(hidden_size: Any, num_heads: Any) -> int:
    """Of a head whose size the file does not say. 0 where it cannot be told: ModelConfig names the field that is wrong."""
    size: int = hidden_size // num_heads if type(hidden_size) is type(num_heads) is int and num_heads > 0 else 0
    return size


def distinct(values: Sequence[Any]) -> tuple[Any, ...]:
    """The values in their order, each once. They may be of any kind."""
    return tuple(value for i, value in enumerate(values) if value not in values[:i])


def token_ids(value: Any) -> list[Any]:
    """One id, a list of ids, or none. Whether they are ids of the model is checked by ModelConfig."""
    return list(value) if isinstance(value, list) else [] if value is None else [value]
