"""Reads Compose files as `docker compose config` would: variables filled in, files merged. Knows of both what ours use.

Where the Compose plugin is installed the test lets that judge too; it is not part of Debian, so the ordinary run does without.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

_VARIABLE = re.compile(r"\$(?:(\$)|\{(\w+)(?:(:?[-?])([^}]*))?\})")


class _Reset:
    """The tag `!reset`: what an earlier file says of this goes."""


class _Loader(yaml.SafeLoader):
    pass


_Loader.add_constructor("!reset", lambda loader, node: _Reset())


def load(paths: list[Path], env: Mapping[str, str]) -> dict[str, Any]:
    """Raises KeyError with its message for a variable that the file says is needed."""
    merged: dict[str, Any] = {}
    for path in paths:
        # As Compose does, in the values and not in the text: a variable's value is never YAML.
        merged = _merge(merged, _fill(yaml.load(path.read_text(), _Loader), env))
    return merged


def _fill(node: Any, env: Mapping[str, str]) -> Any:
    if isinstance(node, dict):
        return {key: _fill(value, env) for key, value in node.items()}
    if isinstance(node, list):
        return [_fill(value, env) for value in node]
    return _VARIABLE.sub(lambda match: _value(match, env), node) if isinstance(node, str) else node


def _value(match: re.Match[str], env: Mapping[str, str]) -> str:
    dollar, name, operator, word = match.groups()
    if dollar:
        return "$"
    value = env.get(name)
    if value is None or (value == "" and (operator or "").startswith(":")):
        if operator in ("?", ":?"):
            raise KeyError(f"{name}: {word}")
        return word or ""
    return value


def _merge(low: Any, high: Any) -> Any:
    if isinstance(low, dict) and isinstance(high, dict):
        keys = [*low, *(key for key in high if key not in low)]
        return {
            key: _merge(low.get(key), high[key]) if key in high else low[key]
            for key in keys
            if not isinstance(high.get(key), _Reset)
        }
    return high
