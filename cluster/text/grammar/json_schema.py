"""Prepares JSON schemas for llguidance: limits their size, and rewrites them so that every document that it allows conforms.

Knows the order of the steps; each has its own file. Knows no grammar.
"""

import json
import math
from decimal import Decimal
from typing import Any

from cluster.text.grammar import keywords
from cluster.text.grammar.errors import GrammarError
from cluster.text.grammar.finite import pruned
from cluster.text.grammar.keys import KeyPatterns
from cluster.text.grammar.objects import with_plain_objects
from cluster.text.grammar.references import resolved
from cluster.text.grammar.walk import mapped

MAX_SCHEMA_CHARS = 100_000
MAX_SCHEMA_DEPTH = 64
# llguidance follows references by recursion in native code: with 8 MiB of stack, a chain of 1,500 ended the process.
MAX_SCHEMA_CHAIN = 600
# A divisor becomes an automaton with that many states, and several in one lexer multiply: 20 divisors of four digits took over ten minutes.
MAX_DIVISORS_PRODUCT = 10_000
MAX_OPTIONAL_PROPERTIES = 400  # of one object; each may come next, and the parser handles 2,000 such items


def normalized(schema: Any, keys: KeyPatterns) -> dict[str, Any]:
    """The schema as llguidance is to enforce it; its references are of the form "#/$defs/name". Raises GrammarError if it cannot be."""
    checked = check_schema(schema)
    if isinstance(checked, bool):
        if not checked:
            raise GrammarError("no document matches the schema false.")
        return {}
    document = resolved(checked)
    _check_chain(document)
    document = mapped(document, keywords.tightened)
    return pruned(with_plain_objects(document, keys))


def check_schema(schema: Any) -> dict[str, Any] | bool:
    """The schema, if it is within the limits. Raises GrammarError."""
    if isinstance(schema, bool):
        return schema
    if not isinstance(schema, dict):
        raise GrammarError("a JSON schema must be an object, true or false.")
    if "x-guidance" in schema:
        raise GrammarError("the schema's 'x-guidance' is not supported.", remedy="Remove it.")
    _measure(schema, level=1)
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


def moved(schema: dict[str, Any], root: str) -> dict[str, Any]:
    """The schema with its references adjusted for a place at `root`, such as "#/$defs/t0"."""

    def move(node: dict[str, Any]) -> dict[str, Any]:
        reference = node.get("$ref")
        return node | {"$ref": root + reference[1:]} if isinstance(reference, str) else node

    result: dict[str, Any] = mapped(schema, move)
    return result


def _check_chain(document: dict[str, Any]) -> None:
    chain = _measure({key: value for key, value in document.items() if key != "$defs"}, level=1)
    chain += sum(_measure(definition, level=1) for definition in document.get("$defs", {}).values())
    if chain > MAX_SCHEMA_CHAIN:
        raise GrammarError("the schema's definitions refer to one another too deeply.", remedy="Use fewer of them.")


def _measure(node: Any, *, level: int) -> int:
    """The depth of nested containers."""
    if level > MAX_SCHEMA_DEPTH:
        raise GrammarError(f"the schema is nested more than {MAX_SCHEMA_DEPTH} levels deep.", remedy="Make it flatter.")
    if isinstance(node, dict):
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
    return 1 + max((_measure(child, level=level + 1) for child in children), default=0)
