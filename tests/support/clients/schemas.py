"""Hypothesis strategies for JSON schemas that are hard to enforce: classes of patterns, keys from patterns, counts of properties,
references, unknown formats. Many have no document at all.
"""

from typing import Any

from hypothesis import strategies as st

_KEYS = ("a", "b", "ab", 'q"', "é", "back\\slash", "x-1")
_CLASS_PARTS = (
    '"',
    "\\\\",
    "a-c",
    "\\d",
    "\\w",
    "\\s",
    "\\S",
    "\\D",
    "\\W",
    "[",
    "&&",
    "\\x00-\\x1f",
    "\\n",
    "é",
    "\\x00-\\x21",
    ":",
)
_KEY_PATTERNS = (
    "^[ab]$",
    "^a?b?$",
    "^(?:a|b|ab)$",
    "^x-",
    "b$",
    "^[a-z]$",
    '^q["]$',
    "^$",
    "^a",
    '[^"]',
    "^[^\\\\]{1,2}$",
)
_FORMATS = (
    "password",
    "byte",
    "path",
    "url",
    "binary",
    "int32",
    "date",
    "time",
    "ipv4",
    "uuid",
    "uri",
    "json-pointer",
    "unknown",
)


@st.composite
def patterns(draw: st.DrawFn) -> str:
    parts = draw(st.lists(st.sampled_from(_CLASS_PARTS), min_size=1, max_size=4, unique=True))
    one = st.sampled_from((f"[{''.join(parts)}]", f"[^{''.join(parts)}]", "\\W", "\\S", "\\D", ".", "x|y", '"', "\\\\"))
    pieces = draw(st.lists(one, min_size=1, max_size=2))
    text = "|".join(pieces) if draw(st.booleans()) else "".join(pieces)
    return draw(st.sampled_from((f"^(?:{text}){{1,3}}$", f"^{text}$", f"^{text}", text)))


def _strings() -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {"type": st.just("string")},
        optional={
            "pattern": patterns(),
            "format": st.sampled_from(_FORMATS),
            "minLength": st.integers(0, 3),
            "maxLength": st.integers(0, 9),
        },
    )


def _scalars() -> st.SearchStrategy[Any]:
    numbers = st.fixed_dictionaries(
        {"type": st.sampled_from(("integer", "number"))},
        optional={
            "minimum": st.integers(-30, 30),
            "exclusiveMaximum": st.integers(-30, 60) | st.floats(-5, 5, allow_nan=False),
            "maximum": st.integers(-30, 60),
        },
    )
    values = st.sampled_from((None, True, 0, -1, "a", 'q"', "\\", "é\n", [1], {"a": 1}, 2.5))
    return st.one_of(
        _strings(),
        _strings(),
        numbers,
        st.builds(lambda v: {"const": v}, values),
        st.builds(lambda v: {"enum": v}, st.lists(values, min_size=1, max_size=3, unique_by=repr)),
        st.sampled_from(({"type": "boolean"}, {"type": "null"}, {"type": ["null", "integer"]}, {}, True, False)),
        st.sampled_from(({"$ref": "#"}, {"$ref": "#/$defs/x"}, {"$ref": "#here"}, {"$ref": "#/properties/a"})),
    )


def _objects(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {"type": st.sampled_from(("object", "object", ["object", "null"]))},
        optional={
            "properties": st.dictionaries(st.sampled_from(_KEYS), inner, max_size=3),
            "patternProperties": st.dictionaries(st.sampled_from(_KEY_PATTERNS), inner, max_size=2),
            "additionalProperties": st.just(False) | inner,
            "required": st.lists(st.sampled_from(_KEYS), max_size=2, unique=True),
            "minProperties": st.integers(0, 3),
            "maxProperties": st.integers(0, 4),
        },
    )


def _arrays(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {"type": st.just("array")},
        optional={
            "items": inner,
            "prefixItems": st.lists(inner, min_size=1, max_size=2),
            "minItems": st.integers(0, 2),
            "maxItems": st.integers(0, 3),
        },
    )


def _combined(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    several = st.lists(inner, min_size=1, max_size=2)
    return st.one_of(
        st.builds(lambda options: {"anyOf": options}, several),
        st.builds(lambda parts: {"allOf": parts}, several),
        st.builds(lambda node, parts: node | {"allOf": parts}, _objects(inner), st.lists(_objects(inner), max_size=1)),
    )


def schemas() -> st.SearchStrategy[dict[str, Any]]:
    """Schemas of objects mostly; "#here" and "#/$defs/x" always exist, "#/properties/a" sometimes."""
    parts = st.recursive(
        _scalars(), lambda inner: st.one_of(_objects(inner), _arrays(inner), _combined(inner)), max_leaves=6
    )
    return st.builds(
        lambda root, x, here: {**root, "$defs": {"x": x, "y": {"$anchor": "here", **here}}},
        _objects(parts) | _combined(parts) | _arrays(parts) | _strings(),
        parts,
        _objects(parts) | _strings(),
    )
