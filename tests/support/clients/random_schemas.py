"""Random JSON schemas with everything that structured outputs support, bounded so that a document ends after a few hundred tokens.

Knows only Python's random numbers; the same seed gives the same schema.
"""

import random
from typing import Any

_WORDS = ("name", "age", "items", "city", "tags", "size", "é tage", 'quote"d', "is_open", "x", "back\\slash", "日本")
_PATTERNS = (
    "^[a-z]{2,8}$",
    "^[A-Z][a-z]{1,6}( [A-Z][a-z]{1,6})?$",
    "^[0-9]{3}-[0-9]{4}$",
    "^(red|green|blue)[!?]{0,2}$",
)
_FORMATS = ("date", "time", "ipv4", "uuid")


def random_schema(seed: int) -> dict[str, Any]:
    rng = random.Random(seed)
    schema = _object(rng, depth=0)
    if rng.random() < 0.3:  # one definition, used twice
        schema["$defs"] = {"shared": _any(rng, depth=2)}
        for name in ("first", "second"):
            schema["properties"][name] = {"$ref": "#/$defs/shared"}
        schema["required"].append("first")
    return schema


def _any(rng: random.Random, *, depth: int) -> dict[str, Any]:
    kinds = [_string, _integer, _constant, _simple]
    if depth < 3:
        kinds += [_object, _array, _either]
    return rng.choice(kinds)(rng, depth=depth)


def _object(rng: random.Random, *, depth: int) -> dict[str, Any]:
    names = rng.sample(_WORDS, rng.randint(1, 4))
    return {
        "type": "object",
        "properties": {name: _any(rng, depth=depth + 1) for name in names},
        "required": rng.sample(names, rng.randint(0, len(names))),
        "additionalProperties": False,
    }


def _array(rng: random.Random, *, depth: int) -> dict[str, Any]:
    if rng.random() < 0.3:
        fixed = [_any(rng, depth=depth + 1) for _ in range(rng.randint(1, 3))]
        return {"type": "array", "prefixItems": fixed, "items": False, "minItems": len(fixed)}
    low = rng.randint(0, 2)
    return {"type": "array", "items": _any(rng, depth=depth + 1), "minItems": low, "maxItems": low + rng.randint(1, 2)}


def _either(rng: random.Random, *, depth: int) -> dict[str, Any]:
    return {"anyOf": [_any(rng, depth=depth + 1) for _ in range(rng.randint(2, 3))]}


def _string(rng: random.Random, *, depth: int) -> dict[str, Any]:
    extra = rng.choice(({}, {"pattern": rng.choice(_PATTERNS)}, {"format": rng.choice(_FORMATS)}))
    if extra:
        return {"type": "string", **extra}
    low = rng.randint(0, 3)
    return {"type": "string", "minLength": low, "maxLength": low + rng.randint(0, 10)}


def _integer(rng: random.Random, *, depth: int) -> dict[str, Any]:
    low = rng.randint(-1000, 1000)
    return {"type": "integer", rng.choice(("minimum", "exclusiveMinimum")): low, "maximum": low + rng.randint(1, 5000)}


def _constant(rng: random.Random, *, depth: int) -> dict[str, Any]:
    values = [rng.choice(_WORDS), rng.randint(-50, 50), rng.random() < 0.5, None, [1, "two"], {"a": 1}]
    return {"enum": rng.sample(values, rng.randint(1, 4))} if rng.random() < 0.7 else {"const": rng.choice(values)}


def _simple(rng: random.Random, *, depth: int) -> dict[str, Any]:
    return {"type": rng.choice(("boolean", "null", ["boolean", "null"]))}
