"""Which keywords of a JSON schema contain schemas, and which contain data. Knows no keyword's meaning."""

from collections.abc import Callable, Iterator
from typing import Any

# Under these keys a "$ref" is data or the name of a property, not a reference.
DATA_KEYS = {"const", "enum", "default", "examples", "example"}
MAP_KEYS = {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"}


def mapped(schema: Any, change: Callable[[dict[str, Any]], Any]) -> Any:
    """Applies `change` to the schema and to every schema inside it, the innermost first."""
    if isinstance(schema, list):
        return [mapped(item, change) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result: dict[str, Any] = {}
    for key, value in schema.items():
        if key in MAP_KEYS and isinstance(value, dict):
            result[key] = {name: mapped(item, change) for name, item in value.items()}
        else:
            result[key] = value if key in DATA_KEYS else mapped(value, change)
    return change(result)


def subschemas(node: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """The schemas directly inside this one that are objects, each with its path, such as ("properties", "a") or ("anyOf", "0")."""
    for key, value in node.items():
        if key in DATA_KEYS:
            continue
        inner: list[tuple[tuple[str, ...], Any]]
        if key in MAP_KEYS and isinstance(value, dict):
            inner = [((key, name), item) for name, item in value.items()]
        elif isinstance(value, list):
            inner = [((key, str(i)), item) for i, item in enumerate(value)]
        else:
            inner = [((key,), value)]
        yield from ((path, item) for path, item in inner if isinstance(item, dict))
