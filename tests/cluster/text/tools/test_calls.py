"""The incremental reader of tool calls, alone and in OutputText: however the text is split, the calls are the same."""

import itertools
import json

import pytest
from support.paths import DEMO_MODEL

from cluster.text.output.output_text import OutputText
from cluster.text.tokenizer import load_tokenizer
from cluster.text.tools.calls import ToolCallDelta, ToolCallParser, new_tool_call_id
from workers.protocol import FinishReason, TokenDelta, TokenLogprob

TOKENIZER = load_tokenizer(DEMO_MODEL)
TOOL_CALLS = TOKENIZER.tool_calls_token_id


def ids():
    return (f"id{i}" for i in itertools.count()).__next__


def read(pieces) -> tuple[str, list[tuple[str, str, str]]]:
    """(text that is not a call, (id, name, arguments) of each call)."""
    parser, shown, calls = ToolCallParser(new_id=ids()), "", []
    for piece in pieces:
        text, deltas = parser.push(piece)
        shown += text
        join(calls, deltas)
    assert parser.num_calls == len(calls)
    return shown, [tuple(call) for call in calls]


def join(calls: list[list[str]], deltas: list[ToolCallDelta]) -> None:
    for delta in deltas:
        if delta.name is not None:
            assert delta.index == len(calls), "calls come in their order"
            calls.append([delta.id, delta.name, ""])
        assert delta.name is None or delta.id is not None
        calls[delta.index][2] += delta.arguments


CASES = {
    "one call": (' [{"name": "f", "arguments": {"a": 1}}]', [("f", '{"a": 1}')]),
    "two calls": (
        '[{"name":"f","arguments":{}},{"name":"g","arguments":{"x":[1,{"y":2}]}}]',
        [("f", "{}"), ("g", '{"x":[1,{"y":2}]}')],
    ),
    "brackets, quotes and escapes in strings": (
        r'[{"name": "f", "arguments": {"s": "a]}\"{[\\", "t": "\u00e9\\"}}]',
        [("f", r'{"s": "a]}\"{[\\", "t": "\u00e9\\"}')],
    ),
    "indented": (
        '[\n  {\n    "name": "f",\n    "arguments": {\n      "a": 1\n    }\n  }\n]',
        [("f", '{\n      "a": 1\n    }')],
    ),
    "arguments first": ('[{"arguments": {"a": 1}, "name": "f"}]', [("f", '{"a": 1}')]),
    "an id of its own": ('[{"name": "f", "arguments": {"a": 1}, "id": "abc"}]', [("f", '{"a": 1}')]),
    "fields between": (
        '[{"type": "function", "x": {"name": "no"}, "name": "f", "arguments": {"name": "n"}}]',
        [("f", '{"name": "n"}')],
    ),
    "no arguments": ('[{"name": "f"}]', [("f", "{}")]),
    "arguments as a string": (r'[{"name": "f", "arguments": "{\"a\": 1}"}]', [("f", '{"a": 1}')]),
    "no list": ('{"name": "f", "arguments": {}}', [("f", "{}")]),
    "text after it": ('[{"name": "f", "arguments": {}}] and more', [("f", "{}")]),
    "a name with escapes": (r'[{"name": "f\u0041", "arguments": {}}]', [("fA", "{}")]),
    "cut in the arguments": ('[{"name": "f", "arguments": {"a": "b', [("f", '{"a": "b')]),
    "cut in the name": ('[{"name": "f', []),
    "cut in the second": ('[{"name": "f", "arguments": {}}, {"name": "g", "argu', [("f", "{}"), ("g", "")]),
    "no name": ('[{"arguments": {"a": 1}}, {"name": "g", "arguments": {}}]', [("g", "{}")]),
    "a name that is not a string": ('[{"name": 3, "arguments": {}}]', []),
    "empty list": ("[]", []),
    "nothing": ("", []),
    "broken": ('[{"name" "f", : {]}}', []),
    "deep": ("[" * 5000, []),
}


@pytest.mark.parametrize("name", CASES)
def test_calls_are_the_same_however_the_text_is_cut(name: str) -> None:
    text, calls = CASES[name]
    expected = ("", [(f"id{i}", *call) for i, call in enumerate(calls)])
    assert read([text]) == expected
    assert read(text) == expected, "character by character"
    for cut in range(0, len(text), max(1, len(text) // 50)):
        assert read([text[:cut], text[cut:]]) == expected, text[:cut]


def test_prose_after_the_token_is_text() -> None:
    assert read([" I would ", "call [f]"]) == ("I would call [f]", [])


def test_a_name_comes_before_its_arguments_and_arguments_as_they_are_written() -> None:
    parser = ToolCallParser(new_id=ids())
    steps = [parser.push(piece)[1] for piece in (' [{"na', 'me": "f"', ', "arguments": {"a"', ": 1}", "}", "]")]
    assert steps == [
        [],
        [ToolCallDelta(0, "id0", "f")],
        [ToolCallDelta(0, arguments='{"a"')],
        [ToolCallDelta(0, arguments=": 1}")],
        [],
        [],
    ]


def test_ids_are_nine_letters_and_digits() -> None:
    made = {new_tool_call_id() for _ in range(100)}
    assert len(made) == 100
    assert all(len(i) == 9 and i.isascii() and i.isalnum() for i in made)


ANSWER = [
    *TOKENIZER.encode("Let me see", bos=False),
    TOOL_CALLS,
    *TOKENIZER.encode('[{"name": "f", "arguments": {"END": "é"}}, {"name": "g", "arguments": {}}]', bos=False),
]
EXPECTED = [["id0", "f", '{"END": "é"}'], ["id1", "g", "{}"]]


def delta(token_ids: list[int], *, finish: FinishReason | None = None, logprobs: bool = False) -> TokenDelta:
    marks = [TokenLogprob(token_id=i, logprob=-1.0, rank=1) for i in token_ids] if logprobs else None
    return TokenDelta(request_id="r", token_ids=token_ids, finish_reason=finish, logprobs=marks)


def test_output_becomes_text_and_calls() -> None:
    output = OutputText(TOKENIZER, stop=["END", "seek"], tool_calls_token_id=TOOL_CALLS, new_tool_call_id=ids())
    text, calls, marks = "", [], []
    for i, token_id in enumerate(ANSWER):
        assert output.called_tools == bool(calls)
        last = FinishReason.STOP if i == len(ANSWER) - 1 else None
        step = output.push(delta([token_id], finish=last, logprobs=True))
        text += step.text
        marks += [p.logprob.token_id for p in step.logprobs]
        join(calls, step.tool_calls)
    assert (text, calls, output.finish_reason) == ("Let me see", EXPECTED, FinishReason.STOP)
    assert marks == ANSWER[: ANSWER.index(TOOL_CALLS)], "log-probabilities are the content's"
    assert output.num_tokens == len(ANSWER)
    assert output.num_chars == len(text)


def test_a_stop_string_before_the_calls_ends_it() -> None:
    output = OutputText(TOKENIZER, stop=["me see"], tool_calls_token_id=TOOL_CALLS)
    step = output.push(delta(ANSWER))
    assert (step.text, step.tool_calls, step.finish_reason) == ("Let ", [], FinishReason.STOP)


def test_without_tools_the_token_is_nothing_special() -> None:
    step = OutputText(TOKENIZER).push(delta(ANSWER, finish=FinishReason.STOP))
    assert step.tool_calls == []
    assert step.text.startswith("Let me see [{")


@pytest.mark.parametrize("cut", range(len(ANSWER)))
def test_a_replay_continues_like_the_original(cut: int) -> None:
    original, rebuilt = (
        OutputText(TOKENIZER, tool_calls_token_id=TOOL_CALLS, new_tool_call_id=ids()) for _ in range(2)
    )
    calls: list[list[str]] = []
    first = original.push(delta(ANSWER[:cut]))
    join(calls, first.tool_calls)
    rebuilt.replay(ANSWER[:cut])
    second = rebuilt.push(delta(ANSWER[cut:], finish=FinishReason.STOP))
    join(calls, second.tool_calls)
    assert (first.text + second.text, calls) == ("Let me see", EXPECTED)


def test_a_length_cut_keeps_what_was_written() -> None:
    output = OutputText(TOKENIZER, tool_calls_token_id=TOOL_CALLS)
    step = output.push(delta(ANSWER[:-20], finish=FinishReason.LENGTH))
    assert step.finish_reason is FinishReason.LENGTH
    assert output.called_tools
    with pytest.raises(json.JSONDecodeError):
        json.loads("".join(d.arguments for d in step.tool_calls if d.index == step.tool_calls[-1].index))
