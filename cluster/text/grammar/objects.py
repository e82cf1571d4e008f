"""Objects of JSON schemas as llguidance must read them: patternProperties, minProperties, maxProperties and additional keys.

llguidance does not count how often a key is used, offers a key pattern even when `properties` names all keys that it has, and lets an
additional key repeat a named one with an escape ("\\u0061" for "a"). So:

    in the schema                                     enforced
    patternProperties with few keys: ^[ab]$           properties a and b
    minProperties with optional properties a, b       anyOf: with a; without a and with b
    maxProperties with optional properties            anyOf: each set of properties of the right size
    two or more additional keys required              refused: they could be the same key twice
    additional keys next to properties                a key pattern, whose keys have no escapes that JSON does not need
    additional keys next to longer key patterns       none

Knows resolved schemas (references.py) and patterns in llguidance's notation.
"""

import itertools
from collections.abc import Iterator
from typing import Any

from cluster.text.grammar.errors import GrammarError
from cluster.text.grammar.keys import KeyPatterns
from cluster.text.grammar.patterns import ANY_TEXT, all_but
from cluster.text.grammar.walk import DATA_KEYS, MAP_KEYS

MAX_LISTED_KEYS = 32  # of one pattern
MAX_PATTERNS = 32  # of one object
MAX_VARIANTS = 64  # of one object
_OBJECT_KEYS = (
    "properties",
    "patternProperties",
    "additionalProperties",
    "required",
    "minProperties",
    "maxProperties",
)
_OTHER_TYPES = ("null", "boolean", "number", "string", "array")


def with_plain_objects(schema: dict[str, Any], keys: KeyPatterns) -> dict[str, Any]:
    """The schema with every object rewritten as in the table above. Raises GrammarError for what cannot be enforced."""
    return _Rewriter(schema, keys).rewritten()


class _Rewriter:
    def __init__(self, schema: dict[str, Any], keys: KeyPatterns) -> None:
        self._schema = schema
        self._definitions: dict[str, Any] = dict(schema.get("$defs", {}))
        self._keys = keys

    def rewritten(self) -> dict[str, Any]:
        originals = list(self._definitions.items())
        root = self._rewrite({key: value for key, value in self._schema.items() if key != "$defs"})
        if root is False:
            raise GrammarError("no text matches it.", remedy="Check minProperties, maxProperties and required.")
        for name, definition in originals:
            self._definitions[name] = self._rewrite(definition)
        return {**root, "$defs": self._definitions} if self._definitions else root

    def _rewrite(self, node: Any) -> Any:
        if isinstance(node, list):
            return [self._rewrite(item) for item in node]
        if not isinstance(node, dict):
            return node
        result: dict[str, Any] = {}
        for key, value in node.items():
            if key in DATA_KEYS:
                result[key] = value
            elif key in MAP_KEYS and isinstance(value, dict):
                result[key] = {name: self._rewrite(item) for name, item in value.items()}
            else:
                result[key] = self._rewrite(value)
        return self._rewrite_object(result)

    def _rewrite_object(self, node: dict[str, Any]) -> Any:
        if not any(key in node for key in _OBJECT_KEYS) or not _may_be(node, "object"):
            return node
        _check_types(node)
        self._list_keys(node)
        variants = list(itertools.islice(_variants(node), MAX_VARIANTS + 1))
        if not variants:
            return _without_objects(node)
        if len(variants) > MAX_VARIANTS:
            raise GrammarError(
                "minProperties or maxProperties of an object allow too many combinations of its properties.",
                remedy="Remove them, or make properties required.",
            )
        if len(variants) == 1:
            return _with_canonical_keys(node | variants[0])
        return self._either(node, variants)

    def _list_keys(self, node: dict[str, Any]) -> None:
        """Moves required names and the keys of patterns that have few to `properties`."""
        patterns: dict[str, Any] = dict(node.get("patternProperties", {}))
        properties: dict[str, Any] = dict(node.get("properties", {}))
        others = node.get("additionalProperties", True)
        if len(patterns) > MAX_PATTERNS:
            raise GrammarError(f"an object has more than {MAX_PATTERNS} patternProperties.", remedy="Use fewer.")
        listed: dict[str, Any] = {}
        for pattern in list(patterns):
            num_named = len(properties.keys() | set(node.get("required", ())))
            found = self._keys.finite(pattern, MAX_LISTED_KEYS + num_named)
            if found is not None:
                listed[pattern] = patterns.pop(pattern)
                for key in found:
                    properties.setdefault(key, True)
        for name in node.get("required", ()):
            if name not in properties:
                is_other = not any(self._keys.matches(pattern, name) for pattern in (*patterns, *listed))
                properties[name] = others if is_other else True
        for name in properties:
            for pattern, schema in listed.items():
                if self._keys.matches(pattern, name):
                    properties[name] = _both(properties[name], schema)
        if properties:
            node["properties"] = properties
        if patterns:
            node["patternProperties"] = patterns
        else:
            node.pop("patternProperties", None)

    def _either(self, node: dict[str, Any], variants: list[dict[str, Any]]) -> dict[str, Any]:
        """The schema with one of several forms of its object, or no object. The forms share their properties as definitions."""
        shared = {name: self._shared(schema) for name, schema in node.get("properties", {}).items()}
        base: dict[str, Any] = {key: node[key] for key in ("patternProperties", "additionalProperties") if key in node}
        options = []
        for variant in variants:
            absent = {name for name, schema in variant["properties"].items() if schema is False}
            properties: dict[str, Any] = {name: False if name in absent else schema for name, schema in shared.items()}
            form: dict[str, Any] = {"type": "object", **base, **variant, "properties": properties}
            options.append(_with_canonical_keys(form))
        others = [name for name in _OTHER_TYPES if _may_be(node, name)]
        options += [{"type": others}] if others else []
        rest = {key: value for key, value in node.items() if key not in _OBJECT_KEYS}
        if rest.keys() & {"anyOf"}:
            return {**rest, "allOf": [*rest.get("allOf", ()), {"anyOf": options}]}
        return {**rest, "anyOf": options}

    def _shared(self, schema: Any) -> Any:
        if not isinstance(schema, dict) or len(schema) < 2:
            return schema
        name = f"p{len(self._definitions)}"
        self._definitions[name] = schema
        return {"$ref": f"#/$defs/{name}"}


def _with_canonical_keys(node: dict[str, Any]) -> dict[str, Any]:
    """The object with a key pattern in place of additionalProperties, where an escape could hide a key that has another schema."""
    others = node.get("additionalProperties", True)
    if others is False:
        return node
    if node.get("patternProperties"):  # no pattern is known for the keys that match none of them
        return node | {"additionalProperties": False}
    if not node.get("properties"):
        return node
    if others is True or others == {}:  # keys of this pattern that are also named need not be excluded
        return node | {"patternProperties": {f"^{ANY_TEXT}$": True}, "additionalProperties": False}
    pattern = all_but(list(node["properties"]))
    if pattern is None:
        raise GrammarError(
            "an object has additionalProperties next to a property with a very long name, which cannot be enforced.",
            remedy="Shorten the name, or set additionalProperties to false.",
        )
    return node | {"patternProperties": {pattern: others}, "additionalProperties": False}


def _variants(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Forms of the object that together are what minProperties and maxProperties allow. No two have a document in common."""
    properties: dict[str, Any] = node.get("properties", {})
    required = [name for name in dict.fromkeys(node.get("required", ())) if name in properties]
    optional = [name for name in properties if name not in required and properties[name] is not False]
    has_others = bool(node.get("patternProperties")) or node.get("additionalProperties", True) is not False
    least = max(0, node.get("minProperties", 0) - len(required))
    most = node.get("maxProperties")
    most = None if most is None else most - len(required)
    for key in ("minProperties", "maxProperties"):
        node.pop(key, None)

    def form(present: tuple[str, ...], absent: set[str], *, others: tuple[int, int | None]) -> dict[str, Any]:
        names = {name: False if name in absent else schema for name, schema in properties.items()}
        bounds = {}
        if others[0]:
            bounds["minProperties"] = others[0] + len(required) + len(present)
        if others[1] is not None and has_others:
            bounds["maxProperties"] = others[1] + len(required) + len(present)
        return {"properties": names, "required": [*required, *present], **bounds}

    if most is not None and (most < 0 or most < least):
        return
    if most is not None and not has_others and most >= len(optional):
        most = None
    if least == 0 and most is None:
        yield {}
        return
    num_fitting = 0
    if most is None:
        # The first `least` optional properties that are present; those between them are absent.
        for present in itertools.combinations(optional, least):
            num_fitting += 1
            passed = set(optional[: optional.index(present[-1])]) - set(present)
            yield form(present, passed, others=(0, None))
    sizes = range(len(optional) + 1) if most is not None else range(max(0, least - 1), min(least, len(optional) + 1))
    for size in sizes:
        missing = max(0, least - size)
        room = None if most is None else most - size
        if (missing > has_others) or (room is not None and room < 0):
            continue
        for present in itertools.combinations(optional, size):
            num_fitting += 1
            yield form(present, set(optional) - set(present), others=(missing, room))
    if not num_fitting and has_others:
        raise GrammarError(
            "the schema's minProperties requires two or more keys that it does not name, which cannot be enforced.",
            remedy="Name them in 'properties', or lower minProperties.",
        )


def _without_objects(node: dict[str, Any]) -> Any:
    others = [name for name in _OTHER_TYPES if _may_be(node, name)]
    rest = {key: value for key, value in node.items() if key not in (*_OBJECT_KEYS, "type")}
    types = [name for name in others if name != "number" or _may_be_any_number(node)]
    types += ["integer"] if "number" in others and "number" not in types else []
    return rest | {"type": types} if types else False


def _both(first: Any, second: Any) -> Any:
    if first is True or first == {}:
        return second
    if second is True or second == {}:
        return first
    return False if first is False or second is False else {"allOf": [first, second]}


def _may_be(node: dict[str, Any], kind: str) -> bool:
    declared = node.get("type")
    names = [declared] if isinstance(declared, str) else declared
    if not isinstance(names, list):
        return True
    return kind in names or (kind == "number" and "integer" in names)


def _may_be_any_number(node: dict[str, Any]) -> bool:
    return "type" not in node or "number" in node["type"]


def _check_types(node: dict[str, Any]) -> None:
    """Of the keywords that are read here; llguidance checks the others."""
    expected: dict[str, tuple[type, ...]] = {
        "properties": (dict,),
        "patternProperties": (dict,),
        "required": (list,),
        "additionalProperties": (dict, bool),
        "minProperties": (int,),
        "maxProperties": (int,),
    }
    for key, types in expected.items():
        value = node.get(key)
        wrong = key in node and (not isinstance(value, types) or (isinstance(value, bool) and bool not in types))
        if wrong or (isinstance(value, list) and not all(isinstance(item, str) for item in value)):
            raise GrammarError(f"the schema's {key!r} has the wrong type.", remedy="Check it.")
        if isinstance(value, int) and not isinstance(value, bool) and value < 0:
            raise GrammarError(f"the schema's {key!r} is negative.", remedy="Use 0 or more.")
