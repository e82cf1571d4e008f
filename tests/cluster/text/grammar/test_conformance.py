"""What comes out conforms: each schema is refused on arrival, or every document that its grammar lets a model write is valid.

jsonschema is the reference. The engine's matcher chooses among all tokens at random, with a liking for those that break things.
"""

# Rows of the tables are one line each.
# ruff: noqa: E501

import json
import random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator, FormatChecker
from llguidance import LLTokenizer
from support.clients.schemas import schemas

from cluster.text.grammar import compiler as grammars
from cluster.text.grammar.compiler import GrammarCompiler, StructuredOutput
from workers.errors import RequestError
from workers.sampling.vocabulary import new_matcher

FORMATS = FormatChecker(formats=["date", "uuid", "ipv4"])
NULLS = {"type": "object", "additionalProperties": {"type": "null"}}
MAX_TOKENS = 120


def validator(schema: dict[str, Any]) -> Draft202012Validator:
    return Draft202012Validator(schema, format_checker=FORMATS)


def grammar_of(compiler: GrammarCompiler, schema: dict[str, Any]) -> str:
    return compiler.compile(StructuredOutput("json", schema), at_start=False, param="p")


def written(vocabulary: LLTokenizer, grammar: str, rng: random.Random, preferred: list[int]) -> str | None:
    """A document of random tokens; None if it is not complete after MAX_TOKENS."""
    matcher, ids = new_matcher(vocabulary, grammar), []
    while not matcher.is_stopped() and len(ids) < MAX_TOKENS:
        mask = int.from_bytes(matcher.compute_bitmask(), "little")
        assert not matcher.is_error(), f"after {vocabulary.decode_str(ids)!r}: {matcher.get_error()[:300]}"
        assert mask, f"no token may follow {vocabulary.decode_str(ids)!r}"
        liked = [token for token in preferred if mask >> token & 1]
        # The end first, the longer the text is.
        ends = [token for token in liked if token in vocabulary.eos_tokens] if rng.random() < len(ids) / 40 else []
        token = rng.choice(ends or liked) if liked and rng.random() < 0.7 else grammars.random_token(mask, rng)
        assert matcher.consume_token(token), matcher.get_error()[:300]
        ids.append(token)
    if not matcher.is_stopped():
        return None
    return vocabulary.decode_bytes([i for i in ids if i not in vocabulary.eos_tokens]).decode(errors="surrogateescape")


@pytest.fixture(scope="module")
def preferred(vocabulary: LLTokenizer) -> list[int]:
    """Tokens of one character that quote, escape, separate or close, the end of text, and a few letters."""
    texts = {c.encode() for c in '"\\{}[],:abnulxé\n0'} | {b'"}', b'",', b'":'}
    return [
        i for i in range(vocabulary.vocab_size) if vocabulary.decode_bytes([i]) in texts or i in vocabulary.eos_tokens
    ]


CONFORMING: list[tuple[str, dict[str, Any], list[str], list[str]]] = [
    (
        "a class that excludes backslash and quotation mark",
        {"type": "object", "properties": {"f": {"type": "string", "pattern": '^[^\\\\/:*?"<>|]{1,12}$'}}, "required": ["f"], "additionalProperties": False},
        ['{"f":"name.txt"}', '{"f":"a\\nb"}'],
        ['{"f":"\\\\"}', '{"f":"\\""}', '{"f":""}'],
    ),
    ("a class without the quotation mark", {"type": "string", "pattern": '^[^"]$'}, ['"\\\\"', '"\\n"', '"é"'], ['"\\""']),
    ("a class without the backslash", {"type": "string", "pattern": "^[^\\\\]$"}, ['"\\""', '"\\t"'], ['"\\\\"']),
    ("control characters alone", {"type": "string", "pattern": "^[\\x00-\\x1f]$"}, ['"\\n"', '"\\u0001"'], ['"\\""', '"\\\\"', '"a"']),
    ("ranges around the two", {"type": "string", "pattern": "^[\\x00-\\x21\\x23-\\x5b\\x5d-\\x7f]$"}, ['"!"', '"a"'], ['"\\""', '"\\\\"']),
    ("alternatives that add up", {"type": "string", "pattern": '^(?:[\\x00-\\x0f]|[\\x10-\\x1f]|a)$'}, ['"a"', '"\\t"'], ['"\\""', '"\\\\"']),
    ("brackets and operators are plain in a class", {"type": "string", "pattern": "^[[&&~~]$"}, ['"["', '"&"', '"~"'], ['"a"']),
    ("digits of other scripts", {"type": "string", "pattern": "^\\d[^\\d]\\D$"}, ['"1ab"'], ['"١ab"', '"1١a"', '"1a١"']),
    (
        "key patterns that are used up",
        {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "null"}}, "required": ["a", "b"], "patternProperties": {"^[ab]$": {}}, "additionalProperties": False},
        ['{"a":1,"b":null}'],
        ['{"a":1}', '{"a":"x","b":null}', '{"a":1,"b":null,"a":1}', '{"a":1,"b":null,'],
    ),
    (
        "a key pattern binds named properties too",
        {"type": "object", "properties": {"ab": {"minimum": 3}}, "patternProperties": {"^ab?$": {"type": "integer"}}, "additionalProperties": False},
        ['{"ab":4}', '{"a":1}', '{"ab":3,"a":0}', "{}"],
        ['{"ab":2}', '{"ab":"x"}', '{"b":1}'],
    ),
    (
        "two key patterns with a key in common",
        {"type": "object", "patternProperties": {"^[ab]$": {"type": "integer"}, "^[bc]$": {"minimum": 5}}, "additionalProperties": False},
        ['{"a":1}', '{"b":5}', '{"c":"x"}'],
        ['{"b":1}', '{"b":"x"}', '{"c":1}'],
    ),
    (
        "minProperties and a key pattern",
        {"type": "object", "patternProperties": {"^[abc]$": {"type": "null"}}, "minProperties": 2, "additionalProperties": False},
        ['{"a":null,"b":null}', '{"b":null,"c":null}', '{"a":null,"b":null,"c":null}'],
        ['{"a":null}', '{"a":null,"a":null}', "{}"],
    ),
    (
        "minProperties and optional properties",
        {"type": "object", "properties": {"a": {}, "b": {}, "c": {}}, "minProperties": 1, "additionalProperties": False},
        ['{"a":1}', '{"c":1}', '{"a":1,"c":2}'],
        ["{}"],
    ),
    (
        "maxProperties and optional properties",
        {"type": "object", "properties": {"a": {}, "b": {}, "c": {}}, "maxProperties": 2, "additionalProperties": False},
        ["{}", '{"a":1}', '{"a":1,"c":2}'],
        ['{"a":1,"b":1,"c":1}'],
    ),
    ("minProperties 1 and any key", NULLS | {"minProperties": 1}, ['{"a":null}', '{"x":null}'], ["{}"]),
    (
        "minProperties and required properties",
        NULLS | {"properties": {"a": {"type": "null"}}, "required": ["a"], "minProperties": 2},
        ['{"a":null,"b":null}'],
        ['{"a":null}', '{"a":null,"a":null}'],
    ),
    ("no object, but null", {"type": ["object", "null"], "required": ["a"], "maxProperties": 0}, ["null"], ["{}", '{"a":1}']),
    (
        "an escape does not make another key",
        {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]},
        ['{"a":1,"b":2}'],
        ['{"a":1,"\\u0061":2}'],
    ),
    (
        "nor with a schema for other keys",
        {"type": "object", "properties": {"a": {"const": 1}}, "additionalProperties": {"type": "integer"}},
        ['{"a":1,"b":2}', '{"ab":2}'],
        ['{"a":1,"\\u0061":2}', '{"b":"x"}'],
    ),
    ("an unknown format", {"type": "string", "format": "password"}, ['"x"', '""'], ["1"]),
    ("another", {"type": "object", "properties": {"p": {"type": "string", "format": "path", "maxLength": 2}}, "required": ["p"], "additionalProperties": False}, ['{"p":"/a"}'], ['{"p":"abc"}']),
    ("a format that llguidance reserves", {"type": "string", "format": "unknown"}, ['"x"'], ["1"]),
    ("a known format acts", {"type": "string", "format": "ipv4"}, ['"127.0.0.1"'], ['"x"']),
    ("a format without a type", {"format": "uuid"}, ["3", '"12345678-1234-1234-1234-123456789012"'], ['"x"']),
    ("a JSON pointer", {"type": "string", "format": "json-pointer"}, ['"/a/~0b"', '""'], ['"a"', '"/~2"']),
    ("recursion with an end", {"type": "object", "properties": {"x": {"$ref": "#"}}, "additionalProperties": False}, ["{}", '{"x":{"x":{}}}'], ['{"x":1}']),
    (
        "an optional property without an end is left out",
        {"type": "object", "properties": {"a": {"const": 1}, "x": {"$ref": "#/$defs/x"}}, "additionalProperties": False, "$defs": {"x": {"type": "object", "properties": {"y": {"$ref": "#/$defs/x"}}, "required": ["y"]}}},
        ['{"a":1}', "{}"],
        ['{"x":{"y":'],
    ),
    ("$anchor", {"$ref": "#name", "$defs": {"a": {"$anchor": "name", "const": 7}}}, ["7"], ["8"]),
    ("$id and a relative reference", {"$id": "http://a.example/root.json", "$ref": "item.json", "$defs": {"a": {"$id": "item.json", "const": 7}}}, ["7"], ["8"]),
    (
        "$id changes what '#' means",
        {"type": "array", "items": {"$ref": "inner"}, "$id": "http://a.example/", "$defs": {"x": {"const": 1}, "i": {"$id": "inner", "$ref": "#/$defs/x", "$defs": {"x": {"const": 2}}}}},
        ["[2]"],
        ["[1]"],
    ),
    ("$dynamicRef with one target", {"$dynamicRef": "#t", "$defs": {"a": {"$dynamicAnchor": "t", "const": 7}}}, ["7"], ["8"]),
    ("$id where nothing refers to it", {"$id": "x", "type": "null"}, ["null"], ["1"]),
    ("a property named $id", {"type": "object", "properties": {"$id": {"const": 1}}, "required": ["$id"], "additionalProperties": False}, ['{"$id":1}'], ['{"$id":2}']),
    (
        "oneOf of references that a constant tells apart",
        {"oneOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}], "$defs": {n: {"type": "object", "properties": {"k": {"const": n}}, "required": ["k"], "additionalProperties": False} for n in "ab"}},
        ['{"k":"a"}', '{"k":"b"}'],
        ['{"k":"c"}'],
    ),
    ("keywords that allow everything", {"type": "array", "uniqueItems": False, "minItems": 1.0, "items": {"const": 1}}, ["[1]", "[1,1]"], ["[]"]),
    ("a bound that no float is", {"type": "integer", "minimum": 2**53 + 1, "maximum": 2**53 + 4}, [str(2**53 + 2)], [str(2**53), str(2**53 + 1)]),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "good", "bad"), [row[1:] for row in CONFORMING], ids=[row[0] for row in CONFORMING])
def test_documents(
    compiler, accepts, vocabulary, preferred, schema: dict[str, Any], good: list[str], bad: list[str]
) -> None:
    grammar = grammar_of(compiler, schema)
    for text in good:
        assert validator(schema).is_valid(json.loads(text)), f"the row is wrong: {text}"
        assert accepts(grammar, text), text
    for text in bad:
        assert not accepts(grammar, text), text
    for seed in range(12):
        text = written(vocabulary, grammar, random.Random(seed), preferred)
        if text is not None:
            validator(schema).validate(json.loads(text))


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"type": "object", "properties": {"x": {"$ref": "#"}}, "required": ["x"]}, "no text matches"),
    ({"$ref": "#"}, "no text matches"),
    ({"$ref": "#/$defs/a", "$defs": {"a": {"type": "array", "items": {"$ref": "#/$defs/a"}, "minItems": 1}}}, "no text matches"),
    ({"anyOf": [{"$ref": "#/$defs/a"}, False], "$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}]}}}, "no text matches"),
    (NULLS | {"minProperties": 2}, "two or more keys that it does not name"),
    ({"type": "object", "properties": {"a": {}}, "patternProperties": {"^x-": {}}, "additionalProperties": False, "minProperties": 3}, "two or more keys"),
    ({"type": "object", "properties": {f"p{i}": {} for i in range(20)}, "maxProperties": 10}, "too many combinations"),
    ({"type": "object", "required": ["a", "b"], "maxProperties": 1}, "no text matches"),
    ({"$ref": "#nowhere"}, r"\$anchor that the schema does not have"),
    ({"$ref": "other.json"}, "into the schema itself"),
    ({"$defs": {"a": {"$anchor": "x"}, "b": {"$anchor": "x"}}}, "'x' is used twice"),
    ({"$dynamicRef": "#t", "$defs": {"a": {"$id": "a", "$dynamicAnchor": "t"}, "b": {"$id": "b", "$dynamicAnchor": "t"}}}, "more than one possible target"),
    ({"$recursiveRef": "#"}, r'"\$recursiveRef", which cannot be enforced'),
    ({"type": "object", "dependencies": {"a": ["b"]}}, '"dependencies", which cannot be enforced'),
    ({"type": "string", "pattern": "(?x)a b"}, "the flags 'x'"),
    ({"type": "string", "pattern": "[a"}, "unclosed character class"),
    ({"const": 2**53 + 1}, "above 2.53"),
    ({"type": "integer", "minimum": 2**63}, "beyond 64 bits"),
    ({"type": "object", "required": "a"}, "'required' has the wrong type"),
    ({"type": "object", "minProperties": -1}, "'minProperties' is negative"),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "says"), REFUSED)
def test_what_cannot_be_enforced_is_refused_on_arrival(compiler, schema: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError, match=says) as refused:
        grammar_of(compiler, schema)
    assert refused.value.param == "p"


def check_random_schema(compiler, vocabulary, preferred, schema: dict[str, Any], seed: int) -> None:
    try:
        grammar = grammar_of(compiler, schema)
    except RequestError:
        return
    rng = random.Random(seed)
    for _ in range(4):
        text = written(vocabulary, grammar, rng, preferred)
        if text is not None:
            document = json.loads(text)
            try:
                errors = [error.message for error in validator(schema).iter_errors(document)]
            except RecursionError:  # jsonschema follows {"anyOf": [{"$ref": "#"}, ...]} without end
                continue
            assert not errors, f"{text}: {errors[0]}"


FUNCTION_SCOPED = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]


@settings(max_examples=60, derandomize=True, suppress_health_check=FUNCTION_SCOPED)
@given(schema=schemas(), seed=st.integers(0, 2**32))
def test_random_schemas_are_refused_or_enforced(compiler, vocabulary, preferred, schema, seed) -> None:
    check_random_schema(compiler, vocabulary, preferred, schema, seed)


@pytest.mark.fuzz
@pytest.mark.timeout(1200)
@settings(max_examples=5000, suppress_health_check=FUNCTION_SCOPED)
@given(schema=schemas(), seed=st.integers(0, 2**32))
def test_many_random_schemas_are_refused_or_enforced(compiler, vocabulary, preferred, schema, seed) -> None:
    check_random_schema(compiler, vocabulary, preferred, schema, seed)
