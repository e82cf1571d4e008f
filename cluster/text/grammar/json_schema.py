"""JSON schemas before llguidance sees them: bounds on their size, and readings that keep every document valid to its reader.

Knows which keywords hold schemas and which hold data. Knows no grammar.

    what a schema says          what documents are held to, since readers use floats and calendars
    exclusiveMinimum: 0.81      0.81 + 1e-12 or more: 0.81000000000000000001 is above 0.81 but reads as 0.81
    format: date, date-time     years 1000 to 9999, 29 February in leap years only, no second 60
"""

import json
import math
import urllib.parse
from collections.abc import Callable
from decimal import Decimal
from typing import Any

MAX_SCHEMA_CHARS = 100_000
MAX_SCHEMA_DEPTH = 64
# llguidance follows references by recursion in native code: with 8 MiB of stack, a chain of 1,500 ended the process.
MAX_SCHEMA_CHAIN = 600
# A divisor is an automaton of as many states, and several in one lexer multiply: 20 of four digits did not end in ten minutes.
MAX_DIVISORS_PRODUCT = 10_000
MAX_OPTIONAL_PROPERTIES = 400  # of one object; each may come next, and the parser holds 2,000 such items

# In these a "$ref" is data, or the name of a property, and no reference.
_DATA_KEYS = {"const", "enum", "default", "examples", "example"}
_MAP_KEYS = {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"}

_LEAP_YEAR = r"[1-9]\d(?:0[48]|[2468][048]|[13579][26])|(?:[2468][048]|[13579][26])00"
_DATE = rf"(?:[1-9]\d{{3}}-(?:0[13-9]|1[012])-\d\d|[1-9]\d{{3}}-02-(?:[01]\d|2[0-8])|(?:{_LEAP_YEAR})-02-29)"
_FORMATS = {"date": f"^{_DATE}$", "date-time": rf"^{_DATE}.\d\d:\d\d:[0-5]", "time": r"^\d\d:\d\d:[0-5]"}


class GrammarError(Exception):
    """Why a schema or grammar cannot be used: the end of a sentence that began with the parameter's name."""


def check_schema(schema: Any) -> dict[str, Any] | bool:
    """The schema, if it is within our bounds. Raises GrammarError."""
    if isinstance(schema, bool):
        return schema
    if not isinstance(schema, dict):
        raise GrammarError("a JSON schema is an object, or true or false.")
    if "x-guidance" in schema:
        raise GrammarError("the schema's 'x-guidance' is not supported; remove it.")
    references: set[str] = set()
    chain = _measure(schema, references, level=1)
    chain += sum(_measure(_resolve(schema, r), set(), level=1) for r in references)
    if chain > MAX_SCHEMA_CHAIN:
        raise GrammarError("the schema's definitions refer to one another too deeply; use fewer of them.")
    check_divisors(schema)
    try:
        text = json.dumps(schema, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as e:
        raise GrammarError("the schema holds a number that JSON does not have.") from e
    check_unicode(text)
    if len(text) > MAX_SCHEMA_CHARS:
        raise GrammarError(f"the schema has {len(text):,} characters; at most {MAX_SCHEMA_CHARS:,} are allowed.")
    return schema


def check_divisors(schema: Any) -> None:
    """Raises GrammarError when the multipleOf of all the schema together are too much for one lexer."""
    product, nodes = 1, [schema]
    while nodes:
        node = nodes.pop()
        if isinstance(node, dict):
            divisor = node.get("multipleOf")
            if isinstance(divisor, int | float) and not isinstance(divisor, bool) and math.isfinite(divisor):
                digits = "".join(map(str, Decimal(str(divisor)).normalize().as_tuple().digits))
                product *= max(1, int(digits[:10]))
            nodes += node.values()
        elif isinstance(node, list):
            nodes += node
    if product > MAX_DIVISORS_PRODUCT:
        raise GrammarError(
            f"the divisors in multipleOf, multiplied, are above {MAX_DIVISORS_PRODUCT:,}; use fewer or rounder ones."
        )


def check_unicode(text: str) -> None:
    """Raises GrammarError for half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise GrammarError("it is not valid Unicode: it holds half of a surrogate pair.") from e


def tightened(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema as this file's docstring reads it."""
    return _mapped(schema, _tighten)


def moved(schema: dict[str, Any], root: str) -> dict[str, Any]:
    """The schema with references that are right when it stands at `root`, such as "#/$defs/t0"."""

    def move(node: dict[str, Any]) -> dict[str, Any]:
        reference = node.get("$ref")
        return node | {"$ref": root + reference[1:]} if isinstance(reference, str) else node

    return _mapped(schema, move)


def _mapped(schema: Any, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    """`change` done to each schema in the schema, itself included."""
    if isinstance(schema, list):
        return [_mapped(item, change) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _MAP_KEYS and isinstance(value, dict):
            result[key] = {name: _mapped(item, change) for name, item in value.items()}
        else:
            result[key] = value if key in _DATA_KEYS else _mapped(value, change)
    return change(result)


def _tighten(node: dict[str, Any]) -> dict[str, Any]:
    node = dict(node)
    kind = node.get("type")
    if kind is None or kind == "number" or (isinstance(kind, list) and "number" in kind):
        for exclusive, inclusive, sign in (("exclusiveMinimum", "minimum", 1), ("exclusiveMaximum", "maximum", -1)):
            bound = node.get(exclusive)
            if isinstance(bound, int | float) and not isinstance(bound, bool) and abs(bound) < 1e15:
                del node[exclusive]
                limit = bound + sign * max(1e-12, abs(bound) * 1e-15)
                other = node.get(inclusive)
                if isinstance(other, int | float) and sign * other > sign * limit:
                    limit = other
                node[inclusive] = limit
    stricter = _FORMATS.get(node["format"]) if isinstance(node.get("format"), str) else None
    if stricter is not None and "pattern" not in node:
        node["pattern"] = stricter
    return node


def _measure(node: Any, references: set[str], *, level: int) -> int:
    """How many containers stand within one another; collects the targets of $ref."""
    if level > MAX_SCHEMA_DEPTH:
        raise GrammarError(f"the schema is nested more than {MAX_SCHEMA_DEPTH} levels deep; make it flatter.")
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            references.add(node["$ref"])
        properties, required = node.get("properties"), node.get("required")
        num_required = len(required) if isinstance(required, list) else 0
        if isinstance(properties, dict) and len(properties) - num_required > MAX_OPTIONAL_PROPERTIES:
            raise GrammarError(
                f"an object has more than {MAX_OPTIONAL_PROPERTIES} optional properties; require them, or use fewer."
            )
        children = list(node.values())
    elif isinstance(node, list):
        children = node
    else:
        return 0
    return 1 + max((_measure(child, references, level=level + 1) for child in children), default=0)


def _resolve(schema: dict[str, Any], reference: str) -> Any:
    if reference != "#" and not reference.startswith("#/"):
        raise GrammarError("a $ref must point into the schema itself, like '#/$defs/name'.")
    node: Any = schema
    for part in reference.split("/")[1:]:
        key = urllib.parse.unquote(part).replace("~1", "/").replace("~0", "~")
        if isinstance(node, dict) and key in node:
            node = node[key]
        elif isinstance(node, list) and key.isdecimal() and int(key) < len(node):
            node = node[int(key)]
        else:
            raise GrammarError("a $ref points to nothing in the schema.")
    return node
