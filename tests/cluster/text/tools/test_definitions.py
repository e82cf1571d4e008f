"""Grammars of answers that may call tools, and call ids in Mistral's format."""

import json
import random
from pathlib import Path

import jsonschema
import llguidance
import pytest
from support.paths import DEMO_MODEL

from cluster.text.grammar import compiler as grammars
from cluster.text.grammar.compiler import GrammarCompiler
from cluster.text.output.output_text import OutputText
from cluster.text.tokenizer import load_tokenizer, open_tokenizer
from cluster.text.tools.definitions import MAX_PARALLEL_CALLS, ToolDefinition, mistral_id, tool_grammar
from workers.errors import RequestError
from workers.protocol import FinishReason, TokenDelta
from workers.sampling.vocabulary import load_grammar_tokenizer

TOKENIZER = load_tokenizer(DEMO_MODEL)
COMPILER = GrammarCompiler(TOKENIZER, vocab_size=TOKENIZER.vocab_size, eos_token_ids=(2,))
VOCABULARY = load_grammar_tokenizer(TOKENIZER.path, vocab_size=TOKENIZER.vocab_size, eos_token_ids=(2,))
TOOL_CALLS = TOKENIZER.tool_calls_token_id
assert TOOL_CALLS is not None

WEATHER = ToolDefinition(
    "get_weather",
    "The weather",
    {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "type": "object",
        "properties": {"city": {"$ref": "#/$defs/city"}, "unit": {"enum": ["C", "F"]}},
        "required": ["city"],
        "additionalProperties": False,
        "$defs": {"city": {"type": "string", "maxLength": 4}},
    },
)
ADD = ToolDefinition(
    "add",
    parameters={
        "type": "object",
        "properties": {
            "$ref": {"type": "integer", "minimum": 0, "maximum": 99},
            "other": {"$ref": "#/properties/$ref"},
        },
        "required": ["$ref", "other"],
        "additionalProperties": False,
    },
)
WEATHER_CALL = '{"name": "get_weather", "arguments": {"city": "Rome"}}'
ADD_CALL = '{"name":"add","arguments":{"$ref":1,"other":2}}'
MANY = [f"[{','.join([ADD_CALL] * num)}]" for num in (MAX_PARALLEL_CALLS, MAX_PARALLEL_CALLS + 1)]
NO_SCHEMA_CALL = '{"name": "add", "arguments": {"anything": [1]}}'


def accepts(grammar: str, text: str, *, calls: str | None = None) -> bool:
    matcher = llguidance.LLMatcher(VOCABULARY, grammar)
    ids = VOCABULARY.greedy_tokenize(text)
    if calls is not None:
        ids += [TOOL_CALLS, *VOCABULARY.greedy_tokenize(calls)]
    return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())


@pytest.mark.parametrize(
    ("options", "good", "bad"),
    [
        ({}, [None, f"[{WEATHER_CALL}]", f" [{ADD_CALL},{WEATHER_CALL}]"], ["[]", "", "[", f"[{NO_SCHEMA_CALL}]"]),
        (
            {"required": True},
            [f"[{ADD_CALL}]", f"[{', '.join([ADD_CALL] * MAX_PARALLEL_CALLS)}]"],
            [None, f"[{','.join([ADD_CALL] * 17)}]"],
        ),
        ({"parallel": False}, [None, f"[{ADD_CALL}]"], [f"[{ADD_CALL}, {ADD_CALL}]"]),
        ({"name": "add"}, [f"[{ADD_CALL}]"], [None, f"[{WEATHER_CALL}]", f"[{ADD_CALL}, {ADD_CALL}]"]),
    ],
)
def test_what_the_grammar_accepts(options, good, bad) -> None:
    """None stands for an answer in plain text."""
    grammar = tool_grammar([WEATHER, ADD], compiler=COMPILER, **options)
    for calls in good:
        assert accepts(grammar, "Some [text].\n" if calls is None else "", calls=calls), calls
    for calls in bad:
        assert not accepts(grammar, "Some text." if calls is None else "", calls=calls), calls
    assert not accepts(grammar, "First text, then", calls=f"[{ADD_CALL}]"), "the template could not write that back"


def test_random_answers_are_calls_that_fit_their_schemas() -> None:
    grammar = tool_grammar([WEATHER, ADD], compiler=COMPILER, required=True)
    schemas = {tool.name: tool.parameters for tool in (WEATHER, ADD)}
    for seed in range(8):
        rng, matcher, ids = random.Random(seed), llguidance.LLMatcher(VOCABULARY, grammar), []
        while not matcher.is_stopped():
            token = grammars.random_token(int.from_bytes(matcher.compute_bitmask(), "little"), rng)
            assert matcher.consume_token(token)
            ids.append(token)
        output = OutputText(TOKENIZER, tool_calls_token_id=TOOL_CALLS)
        step = output.push(
            TokenDelta(request_id="r", token_ids=ids, finish_reason=FinishReason.STOP, stop_token_id=ids[-1])
        )
        names = {d.index: d.name for d in step.tool_calls if d.name}
        assert names
        for index, name in names.items():
            arguments = "".join(d.arguments for d in step.tool_calls if d.index == index)
            jsonschema.validate(json.loads(arguments), schemas[name])


UNSUPPORTED = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}


def test_a_schema_that_cannot_be_enforced_loosens_only_without_strict() -> None:
    grammar = tool_grammar([ToolDefinition("f", parameters=UNSUPPORTED), ADD], compiler=COMPILER)
    assert accepts(grammar, "", calls='[{"name": "f", "arguments": {"b": 1}}]')
    assert not accepts(grammar, "", calls=f"[{NO_SCHEMA_CALL}]"), "the other tool keeps its schema"
    with pytest.raises(RequestError, match=r"'f' is strict.*\"uniqueItems\"") as error:
        tool_grammar([ToolDefinition("f", parameters=UNSUPPORTED, strict=True)], compiler=COMPILER)
    assert error.value.param == "tools"


LOGIN = {
    "type": "object",
    "properties": {"user": {"type": "string"}, "password": {"type": "string", "format": "password"}},
    "required": ["user", "password"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("parameters", "good", "bad"),
    [
        (LOGIN, ['{"user":"u","password":"p"}'], ['{"a":0}', '{"user":"u"}', '{"user":"u","password":1}']),
        (LOGIN | {"$id": "https://a.example/login", "minProperties": 2}, ['{"user":"u","password":"p"}'], ['{"user":"u"}']),
        (
            {"type": "object", "patternProperties": {"^[ab]$": {"$ref": "#n"}}, "minProperties": 2, "additionalProperties": False,
             "$defs": {"n": {"$anchor": "n", "type": "integer"}}},
            ['{"a":1,"b":2}'],
            ['{"a":1}', '{"a":1,"a":2}', '{"a":"x","b":2}'],
        ),
        (
            {"type": "object", "properties": {"child": {"$ref": "#"}, "v": {"const": 1}}, "required": ["v"], "additionalProperties": False},
            ['{"child":{"v":1},"v":1}', '{"v":1}'],
            ['{"child":{},"v":1}'],
        ),
    ],
    ids=["an unknown format", "an $id", "key patterns and an anchor", "recursion"],
)  # fmt: skip
def test_a_tools_parameters_follow_its_schema(parameters, good: list[str], bad: list[str]) -> None:
    for strict in (False, True):
        grammar = tool_grammar([ToolDefinition("f", parameters=parameters, strict=strict), ADD], compiler=COMPILER)
        for arguments in good:
            assert accepts(grammar, "", calls=f'[{{"name": "f", "arguments": {arguments}}}]'), arguments
        for arguments in bad:
            assert not accepts(grammar, "", calls=f'[{{"name": "f", "arguments": {arguments}}}]'), arguments


def test_refusals() -> None:
    with pytest.raises(RequestError, match="are not a schema of an object"):
        tool_grammar([ToolDefinition("f", parameters={"type": "array"})], compiler=COMPILER)
    big = {"type": "object", "properties": {"a": {"const": "x" * 90_000}}}
    with pytest.raises(RequestError, match="400,000 characters"):
        tool_grammar([ToolDefinition(f"f{i}", parameters=big) for i in range(5)], compiler=COMPILER)


def test_a_vocabulary_without_the_token_has_no_tools() -> None:
    import mistral_common

    v1 = open_tokenizer(Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1", "v1")
    assert v1.tool_calls_token_id is None
    with pytest.raises(RequestError, match=r"no \[TOOL_CALLS\]"):
        tool_grammar([ADD], compiler=GrammarCompiler(v1, vocab_size=v1.vocab_size, eos_token_ids=(2,)))


def test_foreign_ids() -> None:
    assert mistral_id("abcDEF123") == "abcDEF123"
    foreign = [
        mistral_id(i) for i in ("call_abc", "call_abd", "", "toolu_01", "é", "abcDEF12", "abcDEF1234", "abc-EF123")
    ]
    assert len(set(foreign)) == len(foreign)
    assert all(len(i) == 9 and i.isalnum() for i in foreign)
    assert mistral_id("call_abc") == foreign[0], "the result's id becomes the call's"
