"""Which parts of a JSON schema have a document at all, and the schema without those that have none.

A schema that always contains itself, such as {"properties": {"x": {"$ref": "#"}}, "required": ["x"]}, has only infinite documents. A model
that may begin one never ends it. Knows resolved schemas (references.py); a document counts as possible when nothing here shows that it
is not, so numbers, lengths and patterns are left to llguidance.
"""

from typing import Any

from cluster.text.grammar.errors import GrammarError
from cluster.text.grammar.walk import mapped

Types = frozenset[str]

_ALL: Types = frozenset(("null", "boolean", "number", "string", "array", "object"))
_NONE: Types = frozenset()


def pruned(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with `false` in place of every schema without a finite document. Raises GrammarError if it has none itself."""
    definitions: dict[str, Any] = schema.get("$defs", {})
    # The least fixed point: a type is possible once a document of it can be built from documents that are known to be possible.
    possible: dict[str, Types] = dict.fromkeys(definitions, _NONE)
    changed, order = True, list(definitions)
    while changed:
        changed = False
        order.reverse()  # a long chain of definitions is done in two passes, whichever way it points
        for name in order:
            types = _types(definitions[name], possible)
            if types != possible[name]:
                possible[name], changed = types, True
    if not _types(schema, possible):
        raise GrammarError("no text matches it.", remedy="Give it an end: make a property that contains it optional.")

    def prune(node: dict[str, Any]) -> Any:
        return node if _types(node, possible) else False

    return _pruned_root(schema, prune) if definitions else schema


def _pruned_root(schema: dict[str, Any], prune: Any) -> dict[str, Any]:
    root = mapped({key: value for key, value in schema.items() if key != "$defs"}, prune)
    definitions = {name: mapped(definition, prune) for name, definition in schema.get("$defs", {}).items()}
    return {**root, "$defs": definitions} if definitions else root


def _types(schema: Any, possible: dict[str, Types]) -> Types:
    """The types of finite documents that the schema may have."""
    if not isinstance(schema, dict):
        return _NONE if schema is False else _ALL
    types = _declared(schema)
    if "const" in schema or "enum" in schema:
        values = [schema["const"]] if "const" in schema else schema["enum"]
        types &= frozenset(map(_type_of, values)) if isinstance(values, list) else _ALL
    reference = schema.get("$ref")
    if isinstance(reference, str):
        types &= possible.get(reference.removeprefix("#/$defs/"), _ALL)
    for part in _list(schema.get("allOf")):
        types &= _types(part, possible)
    for key in ("anyOf", "oneOf"):
        if isinstance(schema.get(key), list):
            types &= _NONE.union(*(_types(option, possible) for option in schema[key]))
    if "object" in types and not _has_object(schema, possible):
        types -= {"object"}
    if "array" in types and not _has_array(schema, possible):
        types -= {"array"}
    return types


def _declared(schema: dict[str, Any]) -> Types:
    declared = schema.get("type")
    if declared is None:
        return _ALL
    names = declared if isinstance(declared, list) else [declared]
    return frozenset("number" if name == "integer" else name for name in names if isinstance(name, str))


def _has_object(schema: dict[str, Any], possible: dict[str, Types]) -> bool:
    properties = schema.get("properties")
    properties = properties if isinstance(properties, dict) else {}
    others = schema.get("additionalProperties", True) if not schema.get("patternProperties") else True
    return all(_types(properties.get(name, others), possible) for name in _list(schema.get("required")))


def _has_array(schema: dict[str, Any], possible: dict[str, Types]) -> bool:
    minimum = schema.get("minItems", 0)
    if not isinstance(minimum, int):
        return True
    first, others = _list(schema.get("prefixItems")), schema.get("items", True)
    if isinstance(others, list):
        first, others = others, schema.get("additionalItems", True)
    needed = first[:minimum] + ([others] if minimum > len(first) else [])
    return all(_types(item, possible) for item in needed)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _type_of(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    names = {int: "number", float: "number", str: "string", list: "array", dict: "object"}
    return names[type(value)]
