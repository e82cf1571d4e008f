"""Tools together with a form of the text: an answer is either a text of that form or calls of the tools."""

from typing import Any

import llguidance
import pytest
from support.paths import DEMO_MODEL

from cluster.text.grammar.compiler import GrammarCompiler, StructuredOutput
from cluster.text.tokenizer import load_tokenizer
from cluster.text.tools.definitions import ToolDefinition, tool_grammar
from workers.sampling.vocabulary import load_grammar_tokenizer

TOKENIZER = load_tokenizer(DEMO_MODEL)
COMPILER = GrammarCompiler(TOKENIZER, vocab_size=TOKENIZER.vocab_size, eos_token_ids=(2,))
VOCABULARY = load_grammar_tokenizer(TOKENIZER.path, vocab_size=TOKENIZER.vocab_size, eos_token_ids=(2,))
NUMBER = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
TOOL = ToolDefinition("add", parameters=NUMBER)
CALL = '[{"name":"add","arguments":{"a":1}}]'
FORMS: list[tuple[StructuredOutput, list[str], list[str]]] = [
    # (form, texts that have it, texts that do not)
    (StructuredOutput("json", NUMBER), ['{"a":1}', '{"a": 22}'], ['{"b":1}', "1", ""]),
    (StructuredOutput("json_object"), ['{"x":[]}', "{}"], ["[]", "hello"]),
    (StructuredOutput("regex", "[0-9]{4}"), ["1234"], ["123", "abcd"]),
    (StructuredOutput("choice", ["yes", " no"]), ["yes", " no"], ["maybe", "yes no"]),
    (StructuredOutput("grammar", 'start: "a" body\nbody: "b" | "c"'), ["ab", "ac"], ["a", "abc"]),
]


def accepts(grammar: str, token_ids: list[int]) -> bool:
    matcher = llguidance.LLMatcher(VOCABULARY, grammar)
    assert not matcher.is_error(), matcher.get_error()
    return bool(matcher.consume_tokens(token_ids)) and bool(matcher.is_accepting())


@pytest.mark.parametrize("at_start", [False, True])
@pytest.mark.parametrize(("form", "good", "bad"), FORMS, ids=[form.kind for form, _, _ in FORMS])
def test_the_format_binds_the_text_and_the_tools_the_calls(
    form: StructuredOutput, good: list[str], bad: list[str], at_start: bool
) -> None:
    text = COMPILER.compile(form, at_start=at_start, param="response_format")
    grammar = tool_grammar([TOOL], compiler=COMPILER, text=text)
    # What is shown starts without the space that the first token may have.
    space = " " if at_start else ""
    for shown in good:
        assert accepts(grammar, VOCABULARY.greedy_tokenize(space + shown)), shown
    for shown in bad:
        assert not accepts(grammar, VOCABULARY.greedy_tokenize(space + shown)), shown
    assert accepts(grammar, [_tool_calls(), *VOCABULARY.greedy_tokenize(CALL)])
    assert not accepts(grammar, [_tool_calls(), *VOCABULARY.greedy_tokenize(good[0])])
    both = [*VOCABULARY.greedy_tokenize(space + good[0]), _tool_calls()]
    assert not accepts(grammar, [*both, *VOCABULARY.greedy_tokenize(CALL)])


@pytest.mark.parametrize("options", [{"required": True}, {"name": "add"}])
def test_an_answer_that_must_call_has_no_text(options: dict[str, Any]) -> None:
    grammar = tool_grammar([TOOL], compiler=COMPILER, **options)
    assert accepts(grammar, [_tool_calls(), *VOCABULARY.greedy_tokenize(CALL)])
    assert not accepts(grammar, VOCABULARY.greedy_tokenize('{"a":1}'))


def _tool_calls() -> int:
    assert TOKENIZER.tool_calls_token_id is not None
    return TOKENIZER.tool_calls_token_id
