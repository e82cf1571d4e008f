"""Tool calls by name, of Mistral's vocabularies since v11: their grammar, and how the output is read, alone and in OutputText."""

import itertools
import json
import random

import jsonschema
import llguidance
import pytest
from support.vocabularies.tekken import write_tekken

from cluster.text.grammar.compiler import GrammarCompiler, StructuredOutput, random_token
from cluster.text.output.output_text import OutputText
from cluster.text.tokenizer import Tokenizer, load_tokenizer
from cluster.text.tools.calls import ToolCallDelta
from cluster.text.tools.definitions import ToolDefinition, tool_grammar
from cluster.text.tools.named_calls import ARGS, CALL_ID, CALLS
from cluster.text.tools.reader import CallReader
from workers.protocol import FinishReason, TokenDelta
from workers.sampling.vocabulary import load_grammar_tokenizer

MARKS = (CALLS, CALL_ID, ARGS)
EOS = 2
Call = tuple[str, str, str]
# The output after the first [TOOL_CALLS], with control tokens as entries of their own.
CASES: dict[str, tuple[list[str], str, list[tuple[str, str]]]] = {
    "one call": (["f", ARGS, '{"a": 1}'], "", [("f", '{"a": 1}')]),
    "v11's id is left out": (["f", CALL_ID, "abcDEF123", ARGS, '{"a": 1}'], "", [("f", '{"a": 1}')]),
    "two calls": (["f", ARGS, "{}", CALLS, "g-h_2", ARGS, '{"x": [1]}'], "", [("f", "{}"), ("g-h_2", '{"x": [1]}')]),
    "control tokens as text": (
        ["f", ARGS, '{"a": "[ARGS] [TOOL_CALLS]"}'],
        "",
        [("f", '{"a": "[ARGS] [TOOL_CALLS]"}')],
    ),
    "spaces around the name": ([" f ", ARGS, " {}"], "", [("f", " {}")]),
    "no [ARGS]": (['f{"a": 1}', CALLS, "g{}"], "", [("f", '{"a": 1}'), ("g", "{}")]),
    "a list, as up to v7": (['[{"name": "f", "arguments": {"a": 1}}]'], "", [("f", '{"a": 1}')]),
    "a list after white space": ([' \n[{"name": "f"}]'], "", [("f", "{}")]),
    "prose": (["I cannot, sorry: {}"], "I cannot, sorry: {}", []),
    "no name": ([ARGS, "{}"], "", []),
    "an empty name": ([" ", ARGS, "{}"], "", []),
    "cut in the name": (["get_wea"], "", []),
    "cut in the id": (["f", CALL_ID, "abc"], "", []),
    "cut in the arguments": (["f", ARGS, '{"a'], "", [("f", '{"a')]),
    "[ARGS] twice": (["f", ARGS, "{", ARGS, "}"], "", [("f", "{}")]),
    "nothing": ([], "", []),
}


def joined(deltas: list[ToolCallDelta]) -> list[Call]:
    calls: list[list[str]] = []
    for delta in deltas:
        if delta.name is not None:
            assert (delta.index, delta.id is not None) == (len(calls), True)
            calls.append([delta.id or "", delta.name, ""])
        calls[delta.index][2] += delta.arguments
    return [(call[0], call[1], call[2]) for call in calls]


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize("name", CASES)
def test_calls_are_the_same_however_the_text_is_cut(name: str, size: int) -> None:
    output, text, expected = CASES[name]
    counter = itertools.count()
    reader, shown, deltas = CallReader(names=True, new_id=lambda: f"id{next(counter)}"), "", []
    for part in output:
        if part in MARKS:
            deltas += reader.mark(part)
            continue
        for i in range(0, len(part), size):
            more, found = reader.push(part[i : i + size])
            shown += more
            deltas += found
    assert joined(deltas) == [(f"id{i}", *call) for i, call in enumerate(expected)]
    assert reader.num_calls == len(expected)
    assert shown == text


def test_without_args_in_the_vocabulary_a_name_is_prose() -> None:
    reader = CallReader(names=False)
    assert reader.push("f") == ("f", [])
    assert reader.mark(ARGS) == []


@pytest.fixture(scope="module", params=["v11", "v13"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_tekken(tmp_path_factory.mktemp(request.param), request.param))


def token_ids(tokenizer: Tokenizer, output: str) -> list[int]:
    """Control tokens in the text are tokens."""
    return tokenizer.encode_prompt(output, add_special_tokens=False)


@pytest.mark.parametrize("per_step", [1, 100])
def test_an_output_with_calls(tokenizer: Tokenizer, per_step: int) -> None:
    output = OutputText(tokenizer, stop=["é"], tool_calls_token_id=tokenizer.tool_calls_token_id)
    written = token_ids(tokenizer, f'Let me see.{CALLS}add{CALL_ID}abcDEF123{ARGS}{{"é": "日本"}}{CALLS}f{ARGS}{{}}')
    text, deltas = "", []
    for i in range(0, len(written), per_step):
        step = output.push(TokenDelta(request_id="r", token_ids=written[i : i + per_step]))
        text += step.text
        deltas += step.tool_calls
    end = output.push(TokenDelta(request_id="r", token_ids=[EOS], finish_reason=FinishReason.STOP, stop_token_id=EOS))
    assert (text + end.text, output.called_tools, end.finish_reason) == ("Let me see.", True, FinishReason.STOP)
    assert [call[1:] for call in joined(deltas + end.tool_calls)] == [("add", '{"é": "日本"}'), ("f", "{}")]


ADD = ToolDefinition(
    "add",
    parameters={
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "é"]}},
        "required": ["a", "b"],
        "additionalProperties": False,
    },
)
NOTHING = ToolDefinition("do_nothing", parameters={"type": "object", "properties": {}, "additionalProperties": False})
ADD_CALL, OTHER_CALL = f'{CALLS}add{ARGS}{{"a": 1, "b": "é"}}', f"{CALLS}do_nothing{ARGS}{{}}"
WITH_ID = f'{CALLS}add{CALL_ID}abcDEF123{ARGS}{{"a": 1, "b": "x"}}'


@pytest.mark.parametrize(
    ("options", "good", "bad"),
    [
        ({}, ["", "Some [text].\n", ADD_CALL, ADD_CALL + OTHER_CALL, WITH_ID], [f"Text.{ADD_CALL}", f"{CALLS}sub{ARGS}{{}}"]),
        ({"required": True}, [ADD_CALL, OTHER_CALL], ["Some text.", f'{CALLS}add{ARGS}{{"a": "1", "b": "x"}}']),
        ({"parallel": False}, ["Text.", OTHER_CALL], [ADD_CALL + OTHER_CALL]),
        ({"name": "do_nothing"}, [OTHER_CALL], [ADD_CALL, "Text.", OTHER_CALL * 2]),
        ({}, [OTHER_CALL * 16], [OTHER_CALL * 17, f"{CALLS}add{CALL_ID}abc{ARGS}" + '{"a": 1, "b": "x"}']),
    ],
)  # fmt: skip
def test_the_grammar(tokenizer: Tokenizer, options: dict, good: list[str], bad: list[str]) -> None:
    size = tokenizer.vocab_size
    compiler = GrammarCompiler(tokenizer, vocab_size=size, eos_token_ids=(EOS,))
    vocabulary = load_grammar_tokenizer(tokenizer.path, vocab_size=size, eos_token_ids=(EOS,))
    grammar = tool_grammar([ADD, NOTHING], compiler=compiler, call_format="names", **options)
    for output, is_good in [(text, True) for text in good] + [(text, False) for text in bad]:
        matcher = llguidance.LLMatcher(vocabulary, grammar)
        written = token_ids(tokenizer, output)
        accepted = matcher.try_consume_tokens(written) == len(written) and matcher.is_accepting()
        assert accepted == is_good, output


def test_a_text_with_a_grammar_of_its_own(tokenizer: Tokenizer) -> None:
    size = tokenizer.vocab_size
    compiler = GrammarCompiler(tokenizer, vocab_size=size, eos_token_ids=(EOS,))
    text = compiler.compile(StructuredOutput("choice", ["yes", "no"]), at_start=True, param="response_format")
    grammar = tool_grammar([ADD], compiler=compiler, call_format="names", text=text)
    vocabulary = load_grammar_tokenizer(tokenizer.path, vocab_size=size, eos_token_ids=(EOS,))
    for output, is_good in (("yes", True), ("maybe", False), (ADD_CALL, True), (f"yes{ADD_CALL}", False)):
        matcher = llguidance.LLMatcher(vocabulary, grammar)
        written = token_ids(tokenizer, output)
        assert (matcher.try_consume_tokens(written) == len(written) and matcher.is_accepting()) == is_good, output


def test_random_answers_are_calls_that_fit_their_schemas(tokenizer: Tokenizer) -> None:
    size = tokenizer.vocab_size
    compiler = GrammarCompiler(tokenizer, vocab_size=size, eos_token_ids=(EOS,))
    vocabulary = load_grammar_tokenizer(tokenizer.path, vocab_size=size, eos_token_ids=(EOS,))
    grammar = tool_grammar([ADD, NOTHING], compiler=compiler, required=True, call_format="names")
    for seed in range(4):
        rng, matcher, written = random.Random(seed), llguidance.LLMatcher(vocabulary, grammar), []
        while not matcher.is_stopped():
            token = random_token(int.from_bytes(matcher.compute_bitmask(), "little"), rng)
            assert matcher.consume_token(token)
            written.append(token)
        output = OutputText(tokenizer, tool_calls_token_id=tokenizer.tool_calls_token_id)
        end = {"finish_reason": FinishReason.STOP, "stop_token_id": written[-1]}
        calls = joined(output.push(TokenDelta(request_id="r", token_ids=written, **end)).tool_calls)
        assert calls
        for _, name, arguments in calls:
            jsonschema.validate(json.loads(arguments), {"add": ADD, "do_nothing": NOTHING}[name].parameters)
