"""Keywords of single JSON schemas as llguidance must read them, so that validators accept every document. Knows no other schemas.

in the schema               enforced
exclusiveMinimum: 0.81      0.81 + 1e-12 or more: validators use floats, and 0.81000000000000000001 is parsed as 0.81
format: date, date-time     years 1000 to 9999, 29 February in leap years only, no second 60
format: iri                 a URI, which is also an IRI; other formats that are subsets of known ones alike
format: password            nothing: a format that llguidance does not know is an annotation, as the specification says
pattern                     see patterns.py
minLength: 2.0              2
uniqueItems: false          nothing; other keywords with a value that allows everything alike
"""

import math
from typing import Any

from cluster.text.grammar.errors import GrammarError
from cluster.text.grammar.patterns import portable

_LEAP_YEAR = r"[1-9]\d(?:0[48]|[2468][048]|[13579][26])|(?:[2468][048]|[13579][26])00"
_DATE = rf"(?:[1-9]\d{{3}}-(?:0[13-9]|1[012])-\d\d|[1-9]\d{{3}}-02-(?:[01]\d|2[0-8])|(?:{_LEAP_YEAR})-02-29)"
_FORMAT_PATTERNS = {
    "date": f"^{_DATE}$",
    "date-time": rf"^{_DATE}.\d\d:\d\d:[0-5]",
    "time": r"^\d\d:\d\d:[0-5]",
    "json-pointer": r"^(?:/(?:[^~/]|~[01])*)*$",
    "relative-json-pointer": r"^(?:0|[1-9]\d*)(?:#|(?:/(?:[^~/]|~[01])*)*)$",
}
# What llguidance knows, and others of which it knows a part.
_FORMATS = {
    **{name: name for name in ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid")},
    "uri": "uri",
    "uri-reference": "uri",
    "uri-template": "uri",
    "iri": "uri",
    "iri-reference": "uri",
    "idn-email": "email",
    "idn-hostname": "hostname",
}
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
# A keyword with this value allows everything.
_NEUTRAL: dict[str, Any] = {
    "uniqueItems": False,
    "not": False,
    "unevaluatedProperties": True,
    "unevaluatedItems": True,
    "propertyNames": True,
    "dependentRequired": {},
    "dependentSchemas": {},
    "dependencies": {},
    "patternProperties": {},
    "minProperties": 0,
}
# llguidance ignores them, unless the schema names an old draft.
_NOT_ENFORCED = ("$recursiveRef", "dependencies", "disallow", "extends", "divisibleBy")
_MAX_EXACT = 2**53
_INT64 = 2**63


def tightened(node: dict[str, Any]) -> dict[str, Any]:
    """The schema with the stricter rules of the table above. Raises GrammarError."""
    node = {
        key: value
        for key, value in node.items()
        if not (key in _NEUTRAL and value == _NEUTRAL[key] and type(value) is type(_NEUTRAL[key]))
    }
    for key in _NOT_ENFORCED:
        if key in node:
            raise GrammarError(f'the schema uses "{key}", which cannot be enforced.', remedy="Remove it.")
    for key in _COUNTS:
        if isinstance(node.get(key), float) and node[key].is_integer():
            node[key] = int(node[key])
    _tighten_numbers(node)
    _tighten_strings(node)
    return node


def _tighten_numbers(node: dict[str, Any]) -> None:
    kind = node.get("type")
    if kind is None or kind == "number" or (isinstance(kind, list) and "number" in kind):
        for exclusive, inclusive, sign in (("exclusiveMinimum", "minimum", 1), ("exclusiveMaximum", "maximum", -1)):
            bound: Any = node.get(exclusive)
            if _is_number(bound) and abs(bound) < 1e15:
                del node[exclusive]
                limit = bound + sign * max(1e-12, abs(bound) * 1e-15)
                other: Any = node.get(inclusive)
                if _is_number(other) and sign * other > sign * limit:
                    limit = other
                node[inclusive] = limit
    # llguidance keeps numbers as floats, and bounds of integers as 64 bits.
    for key, sign in (("minimum", 1), ("exclusiveMinimum", 1), ("maximum", -1), ("exclusiveMaximum", -1)):
        bound = node.get(key)
        if isinstance(bound, int) and abs(bound) > _MAX_EXACT and _is_number(bound):
            inward = _rounded(bound, sign)
            if sign * inward >= _INT64:
                raise GrammarError(f'the schema\'s "{key}" is beyond 64 bits.', remedy="Use a smaller number.")
            node[key] = inward
    for value in [
        *([node["const"]] if "const" in node else ()),
        *(node["enum"] if isinstance(node.get("enum"), list) else ()),
    ]:
        _check_constant(value)


def _tighten_strings(node: dict[str, Any]) -> None:
    patterns = [node["pattern"]] if isinstance(node.get("pattern"), str) else []
    name = node.get("format")
    if isinstance(name, str):
        if name in _FORMAT_PATTERNS:
            patterns.append(_FORMAT_PATTERNS[name])
        node["format"] = _FORMATS.get(name)
        if node["format"] is None:
            del node["format"]
    patterns = [portable(pattern) for pattern in patterns]
    if patterns:
        node["pattern"] = patterns[0]
    if patterns[1:]:
        node["allOf"] = [*node.get("allOf", ()), *({"pattern": pattern} for pattern in patterns[1:])]
    keys = node.get("patternProperties")
    if isinstance(keys, dict):
        node["patternProperties"] = {portable(pattern): schema for pattern, schema in keys.items()}


def _rounded(bound: int, sign: int) -> int:
    """The float next to an integer, on the side of larger numbers for sign 1 and of smaller ones for -1."""
    nearest = float(bound)
    if sign * int(nearest) < sign * bound:
        nearest = math.nextafter(nearest, sign * math.inf)
    return int(nearest)


def _check_constant(value: Any) -> None:
    if isinstance(value, int) and abs(value) > _MAX_EXACT and (abs(value) >= _INT64 or int(float(value)) != value):
        raise GrammarError("the schema has a constant integer above 2^53, which cannot be enforced.")
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            _check_constant(item)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
