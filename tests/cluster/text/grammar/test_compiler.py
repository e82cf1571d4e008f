"""Grammars for structured outputs: what they accept and reject, and that hostile ones are rejected in bounded time."""

import itertools
import json
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import llguidance
import pytest
from support.paths import DEMO_MODEL, ROOT

from cluster.text.grammar import compiler as grammars
from cluster.text.grammar.compiler import GrammarCompiler, StructuredOutput
from cluster.text.output.detokenizer import Detokenizer
from cluster.text.tokenizer import load_tokenizer
from workers.errors import RequestError
from workers.sampling.vocabulary import load_grammar_tokenizer

DEMO = DEMO_MODEL
TOKENIZER = load_tokenizer(DEMO)
SIZE, EOS = TOKENIZER.vocab_size, TOKENIZER.eos_token_id
COMPILER = GrammarCompiler(TOKENIZER, vocab_size=SIZE, eos_token_ids=(EOS,))
VOCABULARY = load_grammar_tokenizer(TOKENIZER.path, vocab_size=SIZE, eos_token_ids=(EOS,))


def accepts(grammar: str, text: str) -> bool:
    matcher = llguidance.LLMatcher(VOCABULARY, grammar)
    ids = VOCABULARY.greedy_tokenize(text)
    return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())


OBJECT = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}


@pytest.mark.parametrize(
    ("kind", "value", "good", "bad"),
    [
        ("json", OBJECT, ['{"a":1}', '{"a": 1}', '{\n  "a": 1\n}'], ["{}", '{"a":"x"}', '{"a":  1}', '{"a":1,"b":2}']),
        ("json", True, ["3", "null", '["a", {}]'], ["", "{"]),
        ("json_object", None, ["{}", '{"x": [1, 2]}'], ["[]", "1", "{}{}"]),
        ("regex", r"\d{2}/\d", ["12/3"], ["12/34", "x12/3"]),
        ("regex", r"^(yes|no)$", ["yes", "no"], ["yesno", ""]),
        ("choice", ['a"b', "new\nline", "é", "\\n", "/x/"], ['a"b', "new\nline", "é", "\\n", "/x/"], ["a", "n"]),
        ("grammar", 'start: "a" B\nB: /b+/', ["ab", "abbb"], ["a", "b"]),
        ("grammar", "start: %json " + json.dumps(OBJECT), ['{"a": 1}'], ["{}"]),
        ("grammar", 'start: "[stop]" head\nhead[suffix="."]: /[a-z]*/', ["[stop]a."], ["[stop]a"]),
        ("grammar", 'root ::= "a" [bc]+', ["abc"], ["a"]),
    ],
)
def test_what_a_grammar_accepts(kind, value, good: list[str], bad: list[str]) -> None:
    output = StructuredOutput(kind, value)
    continuing, at_start = (COMPILER.compile(output, at_start=s, param="p") for s in (False, True))
    for text in good:
        assert accepts(continuing, text), text
        assert accepts(at_start, text), text
        assert accepts(at_start, " " + text), "the space that opens an answer does not show"
        assert not accepts(continuing, " " + text), text
    for text in bad:
        assert not accepts(continuing, text), text
        assert not accepts(at_start, text), text


@pytest.mark.parametrize(
    ("kind", "value"), [("regex", " ?[a-z]+"), ("choice", [" yes", "no"]), ("grammar", 'start: " "? "word"')]
)
def test_a_text_that_may_start_with_a_space_matches_as_it_is_shown(kind, value) -> None:
    grammar = COMPILER.compile(StructuredOutput(kind, value), at_start=True, param="p")
    plain = COMPILER.compile(StructuredOutput(kind, value), at_start=False, param="p")
    for text in ("abc", " abc", "  abc", "yes", " yes", "  yes", "no", " no", "word", " word", "  word"):
        if accepts(grammar, text):
            shown = Detokenizer(TOKENIZER.pieces).push(VOCABULARY.greedy_tokenize(text))
            assert accepts(plain, shown), (text, shown)
    assert any(accepts(grammar, text) for text in ("  abc", "  yes", "  word"))


def chain(num: int) -> dict:
    definitions = {f"d{i}": {"type": "array", "items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(num)}
    return {"$ref": "#/$defs/d0", "$defs": {**definitions, f"d{num}": {"type": "string"}}}


def nested(depth: int) -> dict:
    schema: dict = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


REFUSED = [
    ("json", 3, "must be an object, true or false"),
    ("json", False, "no document matches"),
    ("json", {"if": {"type": "string"}}, 'uses "if", which cannot be enforced'),
    ("json", {"type": "array", "uniqueItems": True}, 'uses "uniqueItems"'),
    ("json", {"oneOf": [{"type": "string"}, {"minLength": 3}]}, "Use anyOf"),
    ("json", {"type": "string", "pattern": "(?=a)"}, "look-around"),
    ("json", {"type": "nothing"}, "Invalid type"),
    ("json", {"const": float("inf")}, "number that JSON cannot represent"),
    ("json", {"const": "\ud83d"}, "surrogate"),
    ("json", {"$ref": "#/$defs/a"}, "points to nothing"),
    ("json", {"$ref": "http://example.com/x"}, "into the schema itself"),
    ("json", {"$ref": "#"}, "no text matches"),
    ("json", {"x-guidance": {"lenient": True}}, "x-guidance"),
    ("json", nested(65), "more than 64 levels"),
    ("json", nested(900), "more than 64 levels"),
    ("json", chain(1400), "too deeply"),
    (
        "json",
        {"$defs": {str(i): nested(60) for i in range(20)}, "anyOf": [{"$ref": f"#/$defs/{i}"} for i in range(20)]},
        "too deeply",
    ),
    ("json", {"const": "x" * 100_001}, "at most 100,000"),
    ("json", {"properties": {f"p{i}": {} for i in range(401)}}, "400 optional properties"),
    ("json", {"type": "integer", "multipleOf": 99991}, "multipleOf divisors is above 10,000"),
    (
        "json",
        {"anyOf": [{"type": "integer", "multipleOf": 9973 - k} for k in range(20)]},
        "multipleOf divisors is above 10,000",
    ),
    ("json", {"allOf": [{"enum": [f"v{i}" for i in range(1200)]}] * 4}, "too complex"),
    ("regex", "", "non-empty string"),
    ("regex", "(a", "unclosed group"),
    ("regex", r"(a)\1", "backreferences"),
    ("regex", r"[^\s\S]", "no text matches"),
    ("regex", "a" * 10_001, "at most 10,000"),
    ("regex", "(.{1,1000}){1,1000}", "too complex"),
    ("regex", "\ud83d", "surrogate"),
    ("choice", [], "one or more non-empty strings"),
    ("choice", ["a", ""], "one or more non-empty strings"),
    ("choice", ["a", 1], "one or more non-empty strings"),
    ("choice", ["a", "b", "a"], "listed twice"),
    ("choice", [f"{i}" for i in range(10_001)], "at most 10,000 choices"),
    ("choice", ["x" * 100_001], "100,000 characters"),
    ("grammar", " ", "Lark or GBNF"),
    ("grammar", 'start: "a" b', "unknown name"),
    ("grammar", "start: a\na: a", "no text matches"),
    ("grammar", 'start: "a"\n' * 501, "500 lines"),
    ("grammar", '%llguidance {"no_forcing": false}\nstart: "a"', "cannot be set"),
    ("grammar", "start: %json " + json.dumps(nested(70)), "more than 64 levels"),
    ("grammar", "start: %json {", "cannot be parsed"),
    ("grammar", "start: a\na[temperature=0.5]: /.*/", "'temperature' has no effect"),
    ("grammar", 'start: a\na[capture, stop="x"]: /.*/', "'stop' has no effect"),
    ("grammar", "root ::= (", "cannot be parsed"),
    ("grammar", "start: " + "(" * 9_000 + '"a"' + ")" * 9_000, "too complex"),
]


@pytest.mark.parametrize(("kind", "value", "says"), REFUSED, ids=[f"{k}: {s}" for k, _, s in REFUSED])
def test_what_is_rejected_is_rejected_quickly(kind, value, says: str) -> None:
    begun = time.process_time()
    with pytest.raises(RequestError, match=says) as error:
        COMPILER.compile(StructuredOutput(kind, value), at_start=True, param="response_format")
    assert error.value.param == "response_format"
    assert "\n" not in str(error.value)
    assert time.process_time() - begun < 2


@pytest.mark.parametrize(("step_s", "fits"), [(0.01, True), (0.3, False)])
def test_a_check_has_a_budget_of_cpu_time(step_s: float, fits: bool) -> None:
    """Every reading of the fake clock says that `step_s` more of CPU time was used; a check reads it once a token, at most 16 times."""
    readings = itertools.count()
    compiler = GrammarCompiler(
        TOKENIZER, vocab_size=SIZE, eos_token_ids=(EOS,), cpu_time=lambda: step_s * next(readings)
    )
    output = StructuredOutput("regex", "[a-z]{100}")
    if fits:
        assert compiler.compile(output, at_start=False, param="p")
        return
    with pytest.raises(RequestError, match="more than 1 s of CPU time") as refused:
        compiler.compile(output, at_start=False, param="p")
    assert (refused.value.param, refused.value.remedy) == ("p", "Make it smaller, or less ambiguous.")
    assert next(readings) <= 6, "it ends with the first token beyond the budget"


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("regex", "(a{1000}){1000}"),
        ("regex", "[ab]*a[ab]{200}"),
        ("choice", [f"choice {i}" for i in range(5_000)]),
        ("choice", ["x" * 100_000]),
        ("json", {"const": "x" * 90_000}),
        ("json", chain(150)),
        ("json", {"type": "array", "minItems": 1_000_000, "items": {"type": "string", "minLength": 1_000_000}}),
        ("json", {"properties": {f"p{i}": {"type": "string"} for i in range(400)}}),
        ("json", {"$ref": "#/$defs/node", "$defs": {"node": {"type": "array", "items": {"$ref": "#/$defs/node"}}}}),
    ],
)
def test_large_but_fine_is_quick_at_every_token(kind, value) -> None:
    begun = time.process_time()
    grammar = COMPILER.compile(StructuredOutput(kind, value), at_start=True, param="p")
    assert time.process_time() - begun < 2
    matcher = llguidance.LLMatcher(VOCABULARY, grammar)
    begun = time.process_time()
    for _ in range(20):
        mask = int.from_bytes(matcher.compute_bitmask(), "little")
        assert matcher.consume_token(mask.bit_length() - 1), matcher.get_error()[:200]
        if matcher.is_stopped():
            break
    assert time.process_time() - begun < 1, "a slow mask would hold up every other request of the replica"


def test_the_longest_allowed_chains_do_not_crash_the_process() -> None:
    """llguidance recurses in native code: a stack overflow could not be caught. Run apart, on a thread's stack."""
    code = f"""
import sys, threading
sys.path[:0] = {[str(Path(__file__).parent), str(ROOT / "tests")]!r}
import test_compiler as t
from cluster.text.grammar import json_schema as g
wide = t.chain((g.MAX_SCHEMA_CHAIN - 10) // 3)
rules = "start: a0\\n" + "\\n".join(f'a{{i}}: "b" a{{i + 1}}' for i in range(490)) + '\\na490: "x"'
inside = "start: %json " + __import__("json").dumps(t.chain(190))
def run():
    for output in (("json", wide), ("grammar", rules), ("grammar", inside)):
        t.COMPILER.compile(t.StructuredOutput(*output), at_start=True, param="p")
    print("alive")
thread = threading.Thread(target=run); thread.start(); thread.join()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.strip() == "alive", (done.returncode, done.stderr[-2000:])


def test_random_walks_give_valid_documents() -> None:
    """Any tokens the grammar allows, up to its end, are a document of the schema."""
    import random

    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 5},
            "tags": {"type": "array", "items": {"enum": ["x", "y"]}, "maxItems": 3},
            "n": {"type": "integer", "minimum": -5, "maximum": 5},
        },
        "required": ["name", "n"],
        "additionalProperties": False,
    }
    grammar = COMPILER.compile(StructuredOutput("json", schema), at_start=True, param="p")
    for seed in range(20):
        rng, matcher, ids = random.Random(seed), llguidance.LLMatcher(VOCABULARY, grammar), []
        while not matcher.is_stopped():
            token = grammars.random_token(int.from_bytes(matcher.compute_bitmask(), "little"), rng)
            assert matcher.consume_token(token)
            ids.append(token)
        detokenizer = Detokenizer(TOKENIZER.pieces)
        text = detokenizer.push(i for i in ids if i != EOS) + detokenizer.flush()
        jsonschema.validate(json.loads(text), schema)
