"""Prepares JSON schemas for llguidance: limits their size, and tightens them so that validators accept every document.

Knows which keywords contain schemas and which contain data. Knows no grammar.

    in the schema               enforced, because validators use floats and calendars
    exclusiveMinimum: 0.81      0.81 + 1e-12 or more: 0.81000000000000000001 is above 0.81 but is parsed as 0.81
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
# A divisor becomes an automaton with that many states, and several in one lexer multiply: 20 divisors of four digits took over ten minutes.
MAX_DIVISORS_PRODUCT = 10_000
MAX_OPTIONAL_PROPERTIES = 400  # of one object; each may come next, and the parser handles 2,000 such items

# Under these keys a "$ref" is data or the name of a property, not a reference.
_DATA_KEYS = {"const", "enum", "default", "examples", "example"}
_MAP_KEYS = {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"}

_LEAP_YEAR = r"[1-9]\d(?:0[48]|[2468][048]|[13579][26])|(?:[2468][048]|[13579][26])00"
_DATE = rf"(?:[1-9]\d{{3}}-(?:0[13-9]|1[012])-\d\d|[1-9]\d{{3}}-02-(?:[01]\d|2[0-8])|(?:{_LEAP_YEAR})-02-29)"
_FORMATS = {"date": f"^{_DATE}$", "date-time": rf"^{_DATE}.\d\d:\d\d:[0-5]", "time": r"^\d\d:\d\d:[0-5]"}


class GrammarError(Exception):
    """Why a schema or grammar cannot be used. `message` follows the parameter's name; `remedy` is what to do, or None."""

    def __init__(self, message: str, *, remedy: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy


def check_schema(schema: Any) -> dict[str, Any] | bool:
    """The schema, if it is within the limits. Raises GrammarError."""
    if isinstance(schema, bool):
        return schema
    if not isinstance(schema, dict):
        raise GrammarError("a JSON schema must be an object, true or false.")
    if "x-guidance" in schema:
        raise GrammarError("the schema's 'x-guidance' is not supported.", remedy="Remove it.")
    references: set[str] = set()
    chain = _measure(schema, references, level=1)
    chain += sum(_measure(_resolve(schema, r), set(), level=1) for r in references)
    if chain > MAX_SCHEMA_CHAIN:
        raise GrammarError("the schema's definitions refer to one another too deeply.", remedy="Use fewer of them.")
    check_divisors(schema)
    try:
        text = json.dumps(schema, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as e:
        raise GrammarError("the schema contains a number that JSON cannot represent.") from e
    check_unicode(text)
    if len(text) > MAX_SCHEMA_CHARS:
        raise GrammarError(f"the schema has {len(text):,} characters.", remedy=f"Use at most {MAX_SCHEMA_CHARS:,}.")
    return schema


def check_divisors(schema: Any) -> None:
    """Raises GrammarError if the multipleOf keywords of the whole schema are together too much for one lexer."""
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
            f"the product of all multipleOf divisors is above {MAX_DIVISORS_PRODUCT:,}.",
            remedy="Use fewer or rounder divisors.",
        )


def check_unicode(text: str) -> None:
    """Raises GrammarError if the text contains half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise GrammarError("it is not valid Unicode: it contains half of a surrogate pair.") from e


def tightened(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with the stricter rules of the table above."""
    return _mapped(schema, _tighten)


def moved(schema: dict[str, Any], root: str) -> dict[str, Any]:
    """The schema with its references adjusted for a place at `root`, such as "#/$defs/t0"."""

    def move(node: dict[str, Any]) -> dict[str, Any]:
        reference = node.get("$ref")
        return node | {"$ref": root + reference[1:]} if isinstance(reference, str) else node

    return _mapped(schema, move)


def _mapped(schema: Any, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    """Applies `change` to the schema and to every schema inside it."""
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
    """The depth of nested containers. Adds the targets of $ref to `references`."""
    if level > MAX_SCHEMA_DEPTH:
        raise GrammarError(f"the schema is nested more than {MAX_SCHEMA_DEPTH} levels deep.", remedy="Make it flatter.")
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            references.add(node["$ref"])
        properties, required = node.get("properties"), node.get("required")
        num_required = len(required) if isinstance(required, list) else 0
        if isinstance(properties, dict) and len(properties) - num_required > MAX_OPTIONAL_PROPERTIES:
            raise GrammarError(
                f"an object has more than {MAX_OPTIONAL_PROPERTIES} optional properties.",
                remedy="Make them required, or use fewer.",
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
