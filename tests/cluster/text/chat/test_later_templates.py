"""Templates v3 with tekken, v7, v11 and v13: the same ids as mistral-common's own tokenizers, which read the version from the file."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import mistral_common
import pytest
from mistral_common.protocol.instruct import messages as mistral
from mistral_common.protocol.instruct import tool_calls as mistral_tools
from mistral_common.protocol.instruct.chunk import TextChunk
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from support.vocabularies.tekken import write_tekken

from cluster.text.chat.mistral_template import MistralTemplate
from cluster.text.chat.template import Message
from cluster.text.load import load_text
from cluster.text.tokenizer import load_tokenizer
from cluster.text.tools.definitions import ToolCall, ToolDefinition
from workers.errors import ConfigError, RequestError

DATA = Path(mistral_common.__file__).parent / "data"
VERSIONS = ("v3-tekken", "v7", "v7-tekken", "v11", "v13")
U, A, S, T = "user", "assistant", "system", "tool"
EOS = 2
TOOL = ToolDefinition("add", "Adds", {"type": "object", "properties": {"é": {"type": "integer"}}})
CALL = ToolCall("abcDEF123", "add", '{"é": 1,  "x": "y"}')
OTHER = ToolCall("ABCdef456", "add", "{}")


@dataclass(frozen=True)
class Made:
    folder: Path
    template: MistralTemplate
    reference: MistralTokenizer


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    @cache
    def make(version: str) -> Made:
        folder = tmp_path_factory.mktemp(version)
        if version == "v7":
            path = folder / "tokenizer.model.v7"
            path.symlink_to(DATA / "mistral_instruct_tokenizer_241114.model.v7")
        else:
            path = write_tekken(folder, version.removesuffix("-tekken")) / "tekken.json"
        return Made(
            folder,
            MistralTemplate(load_tokenizer(folder)),
            MistralTokenizer.from_file(str(path), mode=ValidationMode.agnostic),
        )

    return make


def theirs(message: Message) -> Any:
    content: Any = message.content if isinstance(message.content, str) else [TextChunk(text=t) for t in message.content]
    if message.role == U:
        return mistral.UserMessage(content=content)
    if message.role == S:
        return mistral.SystemMessage(content=content)
    if message.role == T:
        return mistral.ToolMessage(content=content, tool_call_id=message.tool_call_id, name="add")
    calls = [
        mistral_tools.ToolCall(id=c.id, function=mistral_tools.FunctionCall(name=c.name, arguments=c.arguments))
        for c in message.tool_calls
    ]
    return mistral.AssistantMessage(content=content or None, tool_calls=calls or None, prefix=message.prefix)


def reference(made: Made, messages: list[Message], *, tools: bool = False) -> list[int]:
    function = mistral_tools.Function(name=TOOL.name, description=TOOL.description, parameters=TOOL.parameters)
    offered = [mistral_tools.Tool(function=function)] if tools else None
    request = ChatCompletionRequest(messages=[theirs(m) for m in messages], tools=offered)
    return made.reference.encode_chat_completion(request).tokens


CONVERSATIONS = {
    "a question": [Message(U, "Hello")],
    "turns": [Message(U, "Hello"), Message(A, "Hi, you?"), Message(U, "Well.  And you?"), Message(A, "Fine"), Message(U, "Good")],
    "a system message": [Message(S, "Be brief."), Message(U, "a"), Message(A, "b"), Message(U, "c")],
    "two system messages": [Message(S, "One."), Message(S, "Two."), Message(U, "Go")],
    "a system message in the middle": [Message(U, "a"), Message(A, "b"), Message(U, "c"), Message(S, "French."), Message(U, "d")],
    "control tokens as text": [Message(S, "[/SYSTEM_PROMPT]"), Message(U, "[INST] </s><s>[TOOL_CALLS][ARGS]<SPECIAL_20>?")],
    "multi-byte": [Message(S, "Répondez en 日本語 😀"), Message(U, "ça va?\n\n\tоk ")],
    "blank": [Message(U, ""), Message(A, "Say something"), Message(U, " ")],
    "parts": [Message(S, ("a", "b")), Message(U, ("c", "d\n", "e")), Message(A, "f"), Message(U, ("g", "h"))],
    "answer with trailing spaces": [Message(U, "a"), Message(A, "b   "), Message(U, "c")],
    "only a system message": [Message(S, "Be brief.")],
    "a prefix": [Message(U, "Count"), Message(A, "One, two", prefix=True)],
    "an answer at the end": [Message(U, "Count"), Message(A, "One")],
    "two users": [Message(U, "a"), Message(U, "b")],
}  # fmt: skip


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("version", VERSIONS)
def test_ids_equal_mistral_commons(made: Callable[[str], Made], version: str, name: str) -> None:
    messages = CONVERSATIONS[name]
    prompt = made(version).template.encode(messages)
    assert prompt.token_ids == reference(made(version), messages)
    assert bool(prompt.continues) == messages[-1].prefix
    assert prompt.token_ids[len(prompt.token_ids) - len(prompt.continues) :] == prompt.continues


ASKED = [Message(S, "Be brief."), Message(U, "1 + 1?")]
CALLED = [*ASKED, Message(A, tool_calls=[CALL]), Message(T, "2", tool_call_id=CALL.id)]
TWICE = [
    *ASKED,
    Message(A, tool_calls=[CALL, OTHER]),
    Message(T, "[2]", tool_call_id=CALL.id),
    Message(T, "x", tool_call_id=OTHER.id),
]


@pytest.mark.parametrize("messages", [ASKED, CALLED, TWICE, [*CALLED, Message(A, "2"), Message(U, "Thanks")]])
@pytest.mark.parametrize("version", VERSIONS)
def test_tools_and_results_equal_mistral_commons(
    made: Callable[[str], Made], version: str, messages: list[Message]
) -> None:
    template = made(version).template
    assert template.supports_tools
    assert template.call_format == ("names" if version in ("v11", "v13") else "list")
    assert template.encode(messages, tools=[TOOL]).token_ids == reference(made(version), messages, tools=True)


@pytest.mark.parametrize("version", VERSIONS)
def test_turns_that_mistral_common_refuses(made: Callable[[str], Made], version: str) -> None:
    template = made(version).template
    a, b = (reference(made(version), [Message(U, text)])[1:] for text in ("a", "b"))
    assert template.encode([Message(U, "a"), Message(A, ""), Message(U, "b")]).token_ids == [1, *a, EOS, *b]
    assert template.encode([Message(U, "a"), Message(A, "", prefix=True)]).token_ids == [1, *a]


@pytest.mark.parametrize("version", VERSIONS)
def test_text_next_to_calls(made: Callable[[str], Made], version: str) -> None:
    """Since v7 mistral-common writes both. Before, ours are in its order."""
    both = [Message(U, "a"), Message(A, "Let me see.", tool_calls=[CALL]), Message(T, "2", tool_call_id=CALL.id)]
    ids = made(version).template.encode(both, tools=[TOOL]).token_ids
    if version != "v3-tekken":
        assert ids == reference(made(version), both, tools=True)
    calls = made(version).reference.instruct_tokenizer.tokenizer.get_special_token("[TOOL_CALLS]")
    text = made(version).reference.instruct_tokenizer.tokenizer.encode("Let me see.", bos=False, eos=False)
    assert ids[ids.index(calls) - len(text) : ids.index(calls)] == text


@pytest.mark.parametrize("version", VERSIONS)
def test_refusals(made: Callable[[str], Made], version: str) -> None:
    with pytest.raises(RequestError, match="must be last message"):
        made(version).template.encode([Message(U, "a"), Message(A, "b", prefix=True), Message(U, "c")])
    with pytest.raises(RequestError, match="not valid Unicode"):
        made(version).template.encode([Message(U, "half \ud83d")])


@pytest.mark.parametrize("version", VERSIONS)
def test_the_version_is_that_of_the_file(made: Callable[[str], Made], version: str) -> None:
    loaded = load_text(made(version).folder, chat_template="auto", model_vocab_size=40_000)
    file = "tokenizer.model.v7" if version == "v7" else "tekken.json"
    number = version.removesuffix("-tekken")
    why = f"since the checkpoint has none, and its tokenizer ({file}) is Mistral's"
    assert loaded.choice == f"mistral-common's {number}, {why}"
    assert isinstance(loaded.chat_template, MistralTemplate)


@pytest.mark.parametrize(
    ("version", "option", "says"),
    [
        ("v7-tekken", "v3-tekken", None),
        ("v11", "v7-tekken", None),
        ("v13", "v11", None),
        ("v7", "v3", None),
        ("v7", "v7-tekken", "v7-tekken is for a tekken.json, but this checkpoint's tokenizer is tokenizer.model.v7"),
        ("v7", "v11", r"needs the control tokens \[ARGS\] and \[CALL_ID\], which tokenizer.model.v7 lacks"),
        ("v7-tekken", "v13", r"needs the control tokens \[ARGS\] and \[CALL_ID\], which tekken.json lacks"),
        ("v13", "v15", r"needs the control tokens \[MODEL_SETTINGS\]"),
    ],
)
def test_another_version_may_be_asked_for(
    made: Callable[[str], Made], version: str, option: str, says: str | None
) -> None:
    folder = made(version).folder
    if says is None:
        loaded = load_text(folder, chat_template=option, model_vocab_size=40_000)
        assert loaded.choice == f"mistral-common's {option}, as requested"
        assert isinstance(loaded.chat_template, MistralTemplate)
        assert loaded.chat_template.version == option.removesuffix("-tekken")
        assert loaded.chat_template.encode([Message(U, "a")]).token_ids[:2] == [1, 3]
    else:
        with pytest.raises(ConfigError, match=says) as error:
            load_text(folder, chat_template=option, model_vocab_size=40_000)
        assert error.value.param == "--chat-template"


SETTINGS = {"reasoning_effort": {"type": "enum", "values": ["none", "high"], "accepts_none": True, "default": "none"}}


def test_v15_writes_the_models_default_settings(tmp_path: Path) -> None:
    folder = write_tekken(tmp_path, "v15", model_settings_builder=SETTINGS)
    loaded = load_text(folder, chat_template="auto", model_vocab_size=40_000)
    assert loaded.choice.startswith("mistral-common's v15, since")
    template = loaded.chat_template
    assert isinstance(template, MistralTemplate)
    assert template.call_format == "names"
    made = Made(folder, template, MistralTokenizer.from_file(str(folder / "tekken.json"), mode=ValidationMode.agnostic))
    for messages in (ASKED, CALLED):
        ids = template.encode(messages, tools=[TOOL]).token_ids
        assert ids == reference(made, messages, tools=True)
        assert "[MODEL_SETTINGS]" in [loaded.tokenizer.pieces.names[i] for i in ids]
    with pytest.raises(ConfigError, match=r"v13 has no settings, which tekken\.json requires"):
        load_text(folder, chat_template="v13", model_vocab_size=40_000)


def test_a_template_that_fails_on_a_plain_question_stops_the_start(tmp_path: Path) -> None:
    write_tekken(tmp_path, "v15")
    with pytest.raises(ConfigError, match=r"v15 with tekken\.json fails on a plain question: .*model_settings_builder"):
        load_text(tmp_path, chat_template="auto", model_vocab_size=40_000)
