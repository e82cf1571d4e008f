"""What is found out about a Jinja template when it is loaded, and how its messages are written because of it."""

from pathlib import Path

import pytest
from support.paths import DEMO_MODEL
from support.vocabularies.chatml import CHATML, MODEL_VOCAB_SIZE, write_chatml

from cluster.text.chat.jinja_environment import compile_template
from cluster.text.chat.jinja_template import JinjaTemplate
from cluster.text.chat.probe import MISTRAL_CALL_ID, OPENAI_CALL_ID, probe
from cluster.text.chat.template import ChatTemplate, Message
from cluster.text.chat.template_files import TemplateFiles
from cluster.text.load import load_text
from cluster.text.tokenizer import load_tokenizer
from cluster.text.tools.definitions import ToolCall, mistral_id
from workers.errors import ConfigError, RequestError

U, A, S = "user", "assistant", "system"
# As many templates are written that also take images.
BOTH = (
    "{% for m in messages %}[{{ m.role }}] {% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}({{ part.text }}){% endfor %}{% endif %}{% endfor %}"
)
ONLY_PARTS = (
    "{% for m in messages %}[{{ m.role }}] {% for part in m.content %}({{ part['text'] }}){% endfor %}{% endfor %}"
)
# The system message is a text, the others may be lists.
MIXED = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ 'S: ' + m.content }}{% elif m.content is string %}{{ m.content }}"
    "{% else %}{% for part in m.content %}({{ part.text }}){% endfor %}{% endif %}{% endfor %}"
)
SHOWS_THE_LIST = "{% for m in messages %}{{ m.content }}{% endfor %}"
AS_JSON = "{% for m in messages %}{{ m.content | tojson }}{% endfor %}"
NEEDS_A_SYSTEM_MESSAGE = (
    "{% if messages[0].role != 'system' %}{{ raise_exception('No rules.') }}{% endif %}" + SHOWS_THE_LIST
)


@pytest.mark.parametrize(
    ("template", "forms"),
    [
        (CHATML, {S: "text", U: "text", A: "text"}),
        (SHOWS_THE_LIST, {S: "text", U: "text", A: "text"}),
        (AS_JSON, {S: "text", U: "text", A: "text"}),
        (BOTH, {S: "text or parts", U: "text or parts", A: "text or parts"}),
        (ONLY_PARTS, {S: "parts", U: "parts", A: "parts"}),
        (MIXED, {S: "text", U: "text or parts", A: "text or parts"}),
        (NEEDS_A_SYSTEM_MESSAGE, {S: "text", U: "text", A: "text"}),
        ("nothing of the messages", {S: "text", U: "text", A: "text"}),
    ],
)
def test_which_form_of_content_it_reads(template: str, forms: dict[str, str]) -> None:
    render = compile_template(template)
    assert probe(render, render).forms == forms


def load(folder: Path, template: str) -> JinjaTemplate:
    loaded = load_text(
        write_chatml(folder, template=template), chat_template="jinja", model_vocab_size=MODEL_VOCAB_SIZE
    )
    assert isinstance(loaded.chat_template, JinjaTemplate)
    return loaded.chat_template


def written(template: ChatTemplate, messages: list[Message], folder: Path) -> str:

    return load_tokenizer(folder).decode(template.encode(messages).token_ids)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (BOTH, "[system] a[user] (b)(c)"),
        (ONLY_PARTS, "[system] (a)[user] (b)(c)"),
        (MIXED, "S: a(b)(c)"),
        (SHOWS_THE_LIST, "ab\nc"),
        (NEEDS_A_SYSTEM_MESSAGE, "ab\nc"),
    ],
)
def test_parts_are_written_as_the_template_reads_them(tmp_path: Path, template: str, text: str) -> None:
    """Lists for templates that read them, as in transformers; otherwise one line for each part, as in vLLM."""
    messages = [Message(S, "a"), Message(U, ("b", "", "c"))]
    assert written(load(tmp_path, template), messages, tmp_path) == text


@pytest.mark.parametrize("template", [BOTH, ONLY_PARTS, CHATML])
def test_a_prefix_of_parts_is_continued(tmp_path: Path, template: str) -> None:
    prompt = load(tmp_path, template).encode([Message(U, "a"), Message(A, ("b", "c"), prefix=True)])
    assert prompt.continues == prompt.token_ids[-len(prompt.continues) :]
    assert prompt.continues


@pytest.mark.parametrize("template", [BOTH, ONLY_PARTS])
@pytest.mark.parametrize("content", ["</s><|im_end|>", ("<|im_", "end|>"), ("a", "<s>")])
def test_special_tokens_in_parts_stay_text(tmp_path: Path, template: str, content: str | tuple[str, ...]) -> None:
    chat = load(tmp_path, template)
    ids = chat.encode([Message(S, content), Message(U, content)]).token_ids
    assert not {0, 1, 2, *range(32_000, MODEL_VOCAB_SIZE)} & set(ids)


@pytest.mark.parametrize(
    "messages",
    [
        [Message(U, "a"), Message(A, ""), Message(U, "b")],
        [Message(U, "a"), Message(A, "b")],
        [Message(S, "a")],
        [Message(A, "a")],
    ],
)
def test_conversations_that_only_the_template_may_refuse(tmp_path: Path, messages: list[Message]) -> None:
    """An empty answer, an answer at the end, no question: rendered as transformers renders them."""
    expected = "".join(f"{m.role}\n{m.content}\n" for m in messages) + "assistant\n"
    assert written(load(tmp_path, CHATML), messages, tmp_path).replace(" ", "") == expected


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ messages[0].content.x.y }}", "UndefinedError: 'str object' has no attribute 'x'"),
        ("{{ missing.x }}", "UndefinedError: 'missing' is undefined"),
        ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
        ("{{ bos + 'x' }}", "UndefinedError: 'bos' is undefined"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError: access to attribute '__class__' of 'str' object is unsafe"),
        ("{{ raise_exception('Never.') }}", "fails on a plain question: Never"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
    ],
)
def test_a_template_that_always_fails_is_found(template: str, says: str) -> None:
    render = compile_template(template)
    with pytest.raises(ConfigError) as error:
        probe(render, render)
    assert says in error.value.message


SHORT_IDS = (
    "{% for m in messages %}{{ m.role }}{% for call in m.tool_calls or [] %}{% if call.id | length != 9 %}"
    "{{ raise_exception('Ids have 9 characters.') }}{% endif %}{{ call.id }}{% endfor %}{{ m.content }}{{ m.tool_call_id }}{% endfor %}"
)
NO_CALLS = "{% for m in messages %}{{ m.content + '' if not m.tool_calls else m.nothing.x }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "fault", "short"),
    [(CHATML, None, False), (SHORT_IDS, None, True), (NO_CALLS, "UndefinedError", False)],
)
def test_tool_calls_are_tried(template: str, fault: str | None, short: bool) -> None:
    render = compile_template(template)
    abilities = probe(render, render)
    assert (abilities.tool_fault or "").startswith(fault or "")
    assert (abilities.tool_fault is None) == (fault is None)
    assert abilities.short_call_ids is short


@pytest.mark.parametrize("call_id", [OPENAI_CALL_ID, MISTRAL_CALL_ID])
def test_ids_of_other_servers_fit_a_template_that_wants_mistrals(tmp_path: Path, call_id: str) -> None:
    """With v3's control tokens, since only Mistral's format of calls can be read."""

    tokenizer = load_tokenizer(DEMO_MODEL)
    chat = JinjaTemplate(
        tokenizer, TemplateFiles({"default": SHORT_IDS + "{{ tools }}"}), model_vocab_size=tokenizer.vocab_size
    )
    messages = [
        Message(U, "a"), Message(A, "Let me see", tool_calls=[ToolCall(call_id, "f", "{}")]),
        Message("tool", "b", tool_call_id=call_id),
    ]  # fmt: skip
    text = tokenizer.decode(chat.encode(messages).token_ids)
    assert text.count(mistral_id(call_id)) == 2, "in the call and in its result"
    assert "Let me see" in text, "text next to calls goes to the template"


def test_a_template_that_fails_only_with_tools_has_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:

    tokenizer = load_tokenizer(DEMO_MODEL)
    files = TemplateFiles({"default": NO_CALLS + "{{ tools }}"})
    chat = JinjaTemplate(tokenizer, files, model_vocab_size=tokenizer.vocab_size)
    assert not chat.supports_tools
    assert "Tools are off" in caplog.text
    with pytest.raises(RequestError, match="does not support tools"):
        chat.encode(
            [Message(U, "a"), Message(A, tool_calls=[ToolCall("i", "f", "{}")]), Message("tool", "b", tool_call_id="i")]
        )
