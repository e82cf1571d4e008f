"""Schemas as llguidance receives them: documents that strict validators accept, and references that move with their schema."""

import datetime
import json
import random

import jsonschema
import llguidance
import pytest
from jsonschema import Draft202012Validator, FormatChecker

from cluster.text.grammar import compiler as grammars
from cluster.text.grammar.compiler import StructuredOutput
from cluster.text.grammar.json_schema import moved, normalized
from cluster.text.grammar.keys import KeyPatterns
from cluster.text.output.detokenizer import Detokenizer

ROOM = ["a", 'd"', "é", "x/y", "$ref"]
LIST = {
    "type": "object",
    "properties": {"n": {"const": 1}, "next": {"$ref": "#/$defs/list"}},
    "required": ["n"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"type": "number", "exclusiveMinimum": 0.81}, ["0.82", "1"], ["0.81", "0.810000000000000000001"]),
        ({"type": "number", "exclusiveMaximum": 0, "minimum": -2}, ["-2", "-0.5"], ["0", "-0", "-0." + "0" * 400 + "1"]),
        ({"type": "number", "exclusiveMinimum": 0, "minimum": 5}, ["5"], ["4"]),
        ({"type": "integer", "exclusiveMinimum": 3}, ["4"], ["3"]),
        ({"format": "date"}, ['"2024-02-29"', '"2000-02-29"', "3"], ['"0000-01-01"', '"2023-02-29"', '"1900-02-29"', '"2023-02-30"']),
        ({"type": "string", "format": "date-time"}, ['"2024-02-29T23:59:59Z"'], ['"2023-02-29T00:00:00Z"', '"2024-01-01T00:00:60Z"']),
        ({"type": "string", "format": "time"}, ['"12:00:00Z"'], ['"12:00:60Z"', '"12:00:00"']),
        ({"enum": [{"exclusiveMinimum": 1}]}, ['{"exclusiveMinimum":1}'], []),
        ({"properties": {"format": {"const": 1}}, "required": ["format"]}, ['{"format":1}'], ['{"format":2}']),
    ],
)  # fmt: skip
def test_what_documents_must_satisfy(compiler, accepts, schema: dict, good: list[str], bad: list[str]) -> None:
    grammar = compiler.compile(StructuredOutput("json", schema), at_start=False, param="p")
    for text in good:
        jsonschema.validate(json.loads(text), schema)
        assert accepts(grammar, text), text
    for text in bad:
        assert not accepts(grammar, text), text


def test_leap_years_are_those_of_the_calendar(compiler, accepts) -> None:
    grammar = compiler.compile(
        StructuredOutput("json", {"type": "string", "format": "date"}), at_start=False, param="p"
    )
    for year in (1000, 1004, 1100, 1200, 1600, 1700, 1904, 1999, 2000, 2001, 2012, 2016, 2100, 2400, 9996, 9999):
        is_leap = (datetime.date(year, 3, 1) - datetime.timedelta(days=1)).day == 29
        assert accepts(grammar, f'"{year}-02-29"') == is_leap, year


def test_references_move_and_data_stays() -> None:
    schema = {
        "$defs": {"a": {"$ref": "#"}},
        "properties": {"$ref": {"$ref": "#/$defs/a"}, "const": {"const": {"$ref": "#/x"}}},
        "anyOf": [{"items": {"$ref": "#/properties/$ref"}}],
        "default": {"$ref": "#"},
    }
    assert moved(schema, "#/$defs/t0") == {
        "$defs": {"a": {"$ref": "#/$defs/t0"}},
        "properties": {"$ref": {"$ref": "#/$defs/t0/$defs/a"}, "const": {"const": {"$ref": "#/x"}}},
        "anyOf": [{"items": {"$ref": "#/$defs/t0/properties/$ref"}}],
        "default": {"$ref": "#"},
    }


@pytest.mark.parametrize("reference", ["#/$defs/a%20b~1c", "#/%24defs/a%20b~1c", "#/$defs/list/0"])
def test_references_are_json_pointers_in_uris(compiler, accepts, reference: str) -> None:
    schema = {"type": "array", "items": {"$ref": reference}, "$defs": {"a b/c": {"const": 7}, "list": [{"const": 7}]}}
    grammar = compiler.compile(StructuredOutput("json", schema), at_start=False, param="p")
    assert accepts(grammar, "[7]")
    assert not accepts(grammar, "[8]")


def test_normalizing_does_not_change_its_argument() -> None:
    schema = {
        "properties": {"a": {"$ref": "#/$defs/a"}, "b": {"const": 2}},
        "patternProperties": {"^[bc]$": {"type": "integer"}},
        "minProperties": 1,
        "$defs": {"a": {"type": "number", "exclusiveMinimum": 1, "anyOf": [{"$ref": "#"}]}},
    }
    before = json.dumps(schema)
    moved(normalized(schema, KeyPatterns()), "#/a")
    assert json.dumps(schema) == before


def random_schema(rng: random.Random, depth: int = 0) -> dict:
    scalars = [
        {"type": "string", "maxLength": rng.randint(0, 4)},
        {"type": "integer", "minimum": rng.randint(-9, 0), "maximum": rng.randint(0, 99)},
        {"type": "number", "exclusiveMinimum": rng.randint(-9, 0) / 4, "exclusiveMaximum": rng.randint(1, 9) / 7},
        {"type": "string", "format": rng.choice(["date", "uuid", "ipv4"])},
        {"type": "string", "pattern": rng.choice([r"^\d{3}-[a-c]$", "^(foo|bar)$"])},
        {"enum": rng.sample(["a", 'q"', 1, 2.5, None, True, [1], {"k": "é"}], 2)},
        {"$ref": "#/$defs/list"},
    ]
    if depth == 3 or rng.random() < 0.5:
        return rng.choice(scalars)
    names = rng.sample(ROOM, rng.randint(0, 3))
    children = [random_schema(rng, depth + 1) for _ in range(3)]
    return rng.choice(
        [
            {
                "type": "object",
                "properties": dict(zip(names, children, strict=False)),
                "required": [n for n in names if rng.random() < 0.6],
                "additionalProperties": False,
            },
            {"type": "array", "items": children[0], "maxItems": 2},
            {"type": "array", "prefixItems": children, "items": False, "minItems": 3},
            {"anyOf": children},
            {"type": "object", "additionalProperties": children[0], "maxProperties": 1},
        ]
    )


@pytest.mark.parametrize("seed", range(60))
def test_random_tokens_write_valid_documents_of_random_schemas(compiler, tokenizer, vocabulary, seed: int) -> None:
    rng = random.Random(seed)
    schema = random_schema(rng) | {"$defs": {"list": LIST}}
    grammar = compiler.compile(StructuredOutput("json", schema), at_start=True, param="p")
    matcher, ids = llguidance.LLMatcher(vocabulary, grammar), []
    while not matcher.is_stopped() and len(ids) < 400:
        token = grammars.random_token(int.from_bytes(matcher.compute_bitmask(), "little"), rng)
        assert matcher.consume_token(token), matcher.get_error()[:200]
        ids.append(token)
    if matcher.is_stopped():
        detokenizer = Detokenizer(tokenizer.pieces)
        text = detokenizer.push(i for i in ids if i != tokenizer.eos_token_id) + detokenizer.flush()
        checker = FormatChecker(formats=["date", "uuid", "ipv4"])
        Draft202012Validator(schema, format_checker=checker).validate(json.loads(text))
