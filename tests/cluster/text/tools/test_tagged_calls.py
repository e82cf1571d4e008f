"""Tool calls between tags, as ChatML fine-tunes in the format of Hermes write them: template, grammar, and how the output is read."""

import itertools
import json
import random
from pathlib import Path
from typing import Any

import jsonschema
import llguidance
import pytest
from support.vocabularies.chatml import MODEL_VOCAB_SIZE, chatml_reference, write_chatml
from transformers.utils.chat_template_utils import render_jinja_template

from cluster.text.chat.jinja_template import JinjaTemplate
from cluster.text.chat.template import Message
from cluster.text.grammar.compiler import GrammarCompiler, StructuredOutput, random_token
from cluster.text.load import LoadedText, load_text
from cluster.text.output.output_text import OutputText
from cluster.text.tools.calls import ToolCallDelta
from cluster.text.tools.definitions import ToolCall, ToolDefinition, tool_grammar
from cluster.text.tools.tagged_calls import CLOSE, OPEN, TaggedCallReader
from workers.errors import RequestError
from workers.protocol import FinishReason, TokenDelta, TokenLogprob
from workers.sampling.vocabulary import load_grammar_tokenizer

# The gist of that of Hermes 2 Pro.
HERMES = (
    "{% if tools %}{{ '<|im_start|>system\\nYou may call functions. Here they are: <tools>' }}"
    "{% for tool in tools %}{{ '\\n' + tool | tojson }}{% endfor %}"
    '{{ \'\\n</tools>\\nCall one with <tool_call>\\n{"name": ..., "arguments": ...}\\n</tool_call><|im_end|>\\n\' }}{% endif %}'
    "{% for message in messages %}{% if message.role == 'tool' %}"
    "{{ '<|im_start|>tool\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}"
    "{% else %}{{ '<|im_start|>' + message.role + '\\n' + (message.content or '') }}"
    "{% for call in message.tool_calls or [] %}"
    "{{ '\\n<tool_call>\\n' + {'name': call.function.name, 'arguments': call.function.arguments} | tojson + '\\n</tool_call>' }}"
    "{% endfor %}{{ '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
ADD = ToolDefinition(
    "add",
    "Adds.",
    {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "é"]}},
        "required": ["a", "b"],
        "additionalProperties": False,
    },
)
NOTHING = ToolDefinition("nothing", parameters={"type": "object", "properties": {}, "additionalProperties": False})
IM_END = 32_000


def call(content: str) -> str:
    return f"{OPEN}\n{content}\n{CLOSE}"


F = '{"name": "f", "arguments": {"a": 1}}'
# The output, the text that is shown, the calls.
CASES: dict[str, tuple[str, str, list[tuple[str, str]]]] = {
    "one call": (call(F), "", [("f", '{"a": 1}')]),
    "text before": (f"Let me see.\n\n{call(F)}", "Let me see.", [("f", '{"a": 1}')]),
    "two calls": (f"{call(F)}\n{call(F.replace('f', 'g'))}\n", "\n", [("f", '{"a": 1}'), ("g", '{"a": 1}')]),
    "two calls without white space": (f"{OPEN}{F}{CLOSE}{OPEN}{F}{CLOSE}", "", [("f", '{"a": 1}')] * 2),
    "a list of calls": (f"{OPEN}[{F}, {F}]{CLOSE}", "", [("f", '{"a": 1}')] * 2),
    "text after": (f"{call(F)} Done.", " Done.", [("f", '{"a": 1}')]),
    "arguments first": (call('{"arguments": {"a": 1}, "name": "f"}'), "", [("f", '{"a": 1}')]),
    "tags in a string": (
        call(f'{{"name": "f", "arguments": {{"a": "{OPEN} < {CLOSE}"}}}}'),
        "",
        [("f", f'{{"a": "{OPEN} < {CLOSE}"}}')],
    ),
    "no tags": ("a < b <tool> \n", "a < b <tool> \n", []),
    "the beginning of a tag": ("a \n<tool_cal", "a \n<tool_cal", []),
    "prose between tags": (f"Use {OPEN}name{CLOSE}.", f"Use{OPEN}name{CLOSE}.", []),
    "cut in the arguments": (f'{OPEN}\n{{"name": "f", "arguments": {{"a": ', "", [("f", '{"a": ')]),
    "cut in the tag": (f"{OPEN}\n{F}\n</tool", "", [("f", '{"a": 1}')]),
    "nothing": ("", "", []),
}


def joined(deltas: list[ToolCallDelta]) -> list[tuple[str, str]]:
    calls: list[list[str]] = []
    for delta in deltas:
        if delta.name is not None:
            assert (delta.index, delta.id is not None) == (len(calls), True)
            calls.append([delta.name, ""])
        calls[delta.index][1] += delta.arguments
    return [(name, arguments) for name, arguments in calls]


@pytest.mark.parametrize("size", [1, 5, 1000])
@pytest.mark.parametrize("name", CASES)
def test_calls_are_the_same_however_the_text_is_cut(name: str, size: int) -> None:
    output, text, expected = CASES[name]
    counter = itertools.count()
    reader, shown, deltas = TaggedCallReader(new_id=lambda: f"id{next(counter)}"), "", []
    for i in range(0, len(output), size):
        more, found = reader.push(output[i : i + size])
        shown += more
        deltas += found
    assert (shown + reader.flush(), joined(deltas)) == (text, expected)
    assert reader.num_calls == len(expected)


# transformers' added tokens: <tool_call> is one token that shows, </tool_call> is text; or both are special.
@pytest.fixture(scope="module", params=["as text", "special"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedText:
    folder = write_chatml(tmp_path_factory.mktemp("hermes"), template=HERMES)
    if request.param == "special":
        path = folder / "tokenizer_config.json"
        config = json.loads(path.read_text())
        config["added_tokens_decoder"] |= {
            str(i): {"content": tag, "special": True} for i, tag in ((32_002, OPEN), (32_004, CLOSE))
        }
        path.write_text(json.dumps(config))
    return load_text(folder, chat_template="auto", model_vocab_size=MODEL_VOCAB_SIZE)


CALL = ToolCall("call_1", "add", '{"a": 1, "b": "é"}')
CONVERSATION = [
    Message("user", "1 + é?"),
    Message("assistant", "Let me see.", tool_calls=[CALL]),
    Message("tool", "2", tool_call_id="call_1"),
]


def test_the_prompt_equals_transformers(loaded: LoadedText) -> None:
    template = loaded.chat_template
    assert isinstance(template, JinjaTemplate) and template.supports_tools and template.call_format == "tags"
    if loaded.tokenizer.control_token_id(OPEN) is not None:
        return  # the reference has one token only
    tool = {"name": ADD.name, "description": ADD.description, "parameters": ADD.parameters}
    called = {"id": CALL.id, "type": "function", "function": {"name": "add", "arguments": json.loads(CALL.arguments)}}
    plain: list[dict[str, Any]] = [
        {"role": "user", "content": "1 + é?"},
        {"role": "assistant", "content": "Let me see.", "tool_calls": [called]},
        {"role": "tool", "content": "2", "tool_call_id": "call_1"},
    ]
    (rendered,), _ = render_jinja_template(
        [plain], tools=[{"type": "function", "function": tool}], chat_template=HERMES, add_generation_prompt=True
    )
    expected = chatml_reference()(rendered, add_special_tokens=False).input_ids
    assert template.encode(CONVERSATION, tools=[ADD]).token_ids == expected


def ids_of(loaded: LoadedText, text: str) -> list[int]:
    return loaded.tokenizer.encode_prompt(text, add_special_tokens=False)


@pytest.mark.parametrize("per_step", [1, 1000])
def test_an_output_with_calls(loaded: LoadedText, per_step: int) -> None:
    output = OutputText(loaded.tokenizer, stop=["arg"], call_tags=True)
    ids = ids_of(loaded, f'Let me see.\n{call(F)}\n{OPEN}{{"name": "g", "arguments": {{"é": "日本"}}}}{CLOSE}')
    text, deltas = "", []
    logprobs: list[TokenLogprob] = []
    for i in range(0, len(ids), per_step):
        part = ids[i : i + per_step]
        scored = [TokenLogprob(token_id=t, logprob=-1.0, rank=1) for t in part]
        step = output.push(TokenDelta(request_id="r", token_ids=part, logprobs=scored))
        text += step.text
        deltas += step.tool_calls
        logprobs += [placed.logprob for placed in step.logprobs]
    end = output.push(
        TokenDelta(request_id="r", token_ids=[IM_END], finish_reason=FinishReason.STOP, stop_token_id=IM_END)
    )
    assert (text + end.text, output.called_tools, end.finish_reason) == ("Let me see.", True, FinishReason.STOP)
    assert joined(deltas + end.tool_calls) == [("f", '{"a": 1}'), ("g", '{"é": "日本"}')]
    shown = [placed.token_id for placed in (*logprobs, *(placed.logprob for placed in end.logprobs))]
    assert loaded.tokenizer.decode(shown).strip() == "Let me see."


def test_a_stop_string_in_the_text_ends_it(loaded: LoadedText) -> None:
    output = OutputText(loaded.tokenizer, stop=["see"], call_tags=True)
    step = output.push(TokenDelta(request_id="r", token_ids=ids_of(loaded, f"Let me see. {call(F)}")))
    assert (step.text, step.finish_reason, step.tool_calls) == ("Let me ", FinishReason.STOP, [])


def test_without_tools_tags_are_text(loaded: LoadedText) -> None:
    output = OutputText(loaded.tokenizer, shows_special=True)
    step = output.push(TokenDelta(request_id="r", token_ids=ids_of(loaded, call(F)), finish_reason=FinishReason.LENGTH))
    assert (OPEN in step.text, step.tool_calls, output.called_tools) == (True, [], False)


@pytest.fixture(scope="module")
def compiler(loaded: LoadedText) -> GrammarCompiler:
    return GrammarCompiler(loaded.tokenizer, vocab_size=MODEL_VOCAB_SIZE, eos_token_ids=(IM_END,))


@pytest.fixture(scope="module")
def vocabulary(loaded: LoadedText) -> llguidance.LLTokenizer:
    return load_grammar_tokenizer(loaded.tokenizer.path, vocab_size=MODEL_VOCAB_SIZE, eos_token_ids=(IM_END,))


ADD_CALL = call('{"name": "add", "arguments": {"a": 1, "b": "é"}}')
OTHER_CALL = call('{"name": "nothing", "arguments": {}}')
WRONG_CALL = call('{"name": "add", "arguments": {"a": "1", "b": "x"}}')


@pytest.mark.parametrize(
    ("options", "good", "bad"),
    [
        ({}, ["", "Some <text>.\n", ADD_CALL, f"{ADD_CALL}\n{OTHER_CALL}"], [f"Text. {ADD_CALL}", WRONG_CALL, call("x")]),
        ({"required": True}, [ADD_CALL, OTHER_CALL], ["Some text.", WRONG_CALL]),
        ({"parallel": False}, ["Text.", OTHER_CALL], [f"{ADD_CALL}\n{OTHER_CALL}"]),
        ({"name": "nothing"}, [OTHER_CALL], [ADD_CALL, "Text.", OTHER_CALL * 2]),
    ],
)  # fmt: skip
def test_the_grammar(
    loaded: LoadedText,
    compiler: GrammarCompiler,
    vocabulary: llguidance.LLTokenizer,
    options: dict[str, Any],
    good: list[str],
    bad: list[str],
) -> None:
    grammar = tool_grammar([ADD, NOTHING], compiler=compiler, call_format="tags", **options)
    for output, is_good in [(text, True) for text in good] + [(text, False) for text in bad]:
        matcher = llguidance.LLMatcher(vocabulary, grammar)
        ids = ids_of(loaded, output)
        assert (matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()) == is_good, output


def test_a_text_with_a_grammar_of_its_own(
    loaded: LoadedText, compiler: GrammarCompiler, vocabulary: llguidance.LLTokenizer
) -> None:
    text = compiler.compile(StructuredOutput("choice", ["yes", "no"]), at_start=True, param="response_format")
    grammar = tool_grammar([ADD], compiler=compiler, call_format="tags", text=text)
    for output, is_good in (("yes", True), ("maybe", False), (ADD_CALL, True), (WRONG_CALL, False)):
        matcher = llguidance.LLMatcher(vocabulary, grammar)
        ids = ids_of(loaded, output)
        assert (matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()) == is_good, output


def test_random_answers_are_calls_that_fit_their_schemas(
    loaded: LoadedText, compiler: GrammarCompiler, vocabulary: llguidance.LLTokenizer
) -> None:
    grammar = tool_grammar([ADD, NOTHING], compiler=compiler, required=True, call_format="tags")
    for seed in range(3):
        rng, matcher, ids = random.Random(seed), llguidance.LLMatcher(vocabulary, grammar), []
        while not matcher.is_stopped():
            token = random_token(int.from_bytes(matcher.compute_bitmask(), "little"), rng)
            assert matcher.consume_token(token)
            ids.append(token)
        output = OutputText(loaded.tokenizer, call_tags=True)
        end = {"finish_reason": FinishReason.STOP, "stop_token_id": ids[-1]}
        step = output.push(TokenDelta(request_id="r", token_ids=ids, **end))
        assert step.tool_calls
        assert step.text.strip() == ""
        for name, arguments in joined(step.tool_calls):
            jsonschema.validate(json.loads(arguments), {"add": ADD, "nothing": NOTHING}[name].parameters)


def test_a_template_with_another_format_has_no_tools(tmp_path: Path) -> None:
    own = HERMES.replace("tool_call>", "function>")
    loaded = load_text(write_chatml(tmp_path, template=own), chat_template="auto", model_vocab_size=MODEL_VOCAB_SIZE)
    assert isinstance(loaded.chat_template, JinjaTemplate)
    with pytest.raises(RequestError, match="does not support tools"):
        loaded.chat_template.encode([Message("user", "a")], tools=[ADD])
