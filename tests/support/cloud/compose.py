"""Reads Compose files as `docker compose config` would: variables substituted, files merged. Supports the syntax that our files use.

Where the Compose plugin is installed the test lets that judge too; it is not part of Debian, so the ordinary run does without.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

_VARIABLE = re.compile(r"\$(?:(\$)|\{(\w+)(?:(:?[-?])([^}]*))?\})")


class _Reset:
    """The tag `!reset`: removes the value from an earlier file."""


class _Loader(yaml.SafeLoader):
    pass


_Loader.add_constructor("!reset", lambda loader, node: _Reset())


def load(paths: list[Path], env: Mapping[str, str]) -> dict[str, Any]:
    """Raises KeyError with the file's message for a required variable that is missing."""
    merged: dict[str, Any] = {}
    for path in paths:
        # In the values, not in the text, as Compose does: the value of a variable is never parsed as YAML.
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
