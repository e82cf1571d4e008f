"""Templates v1, v2 and v3: the same ids as mistral-common's own tokenizers, and pinned pieces."""

import shutil
from pathlib import Path

import mistral_common
import pytest
from mistral_common.protocol.instruct import messages as mistral
from mistral_common.protocol.instruct import tool_calls as mistral_tools
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from support.paths import DEMO_MODEL

from cluster.text.chat.mistral_template import MistralTemplate
from cluster.text.chat.safe_prompt import SAFE_PROMPT, with_safe_prompt
from cluster.text.chat.template import Message
from cluster.text.tokenizer import load_tokenizer, open_tokenizer
from cluster.text.tools.definitions import ToolCall, ToolDefinition, mistral_id
from workers.errors import ConfigError, RequestError

DATA = Path(mistral_common.__file__).parent / "data"
DEMO = DEMO_MODEL / "tokenizer.model.v3"
PATHS = {
    "v1": DATA / "tokenizer.model.v1",
    "v2": DATA / "mistral_instruct_tokenizer_240216.model.v2",
    "v3": DATA / "mistral_instruct_tokenizer_240323.model.v3",
}
REFERENCES = {
    "v1": MistralTokenizer.v1(),
    "v2": MistralTokenizer.v2(),
    "v3": MistralTokenizer.v3(),
    "demo": MistralTokenizer.from_file(str(DEMO)),
}
TEMPLATES = {version: MistralTemplate(open_tokenizer(path, version)) for version, path in PATHS.items()}
TEMPLATES["demo"] = MistralTemplate(load_tokenizer(DEMO.parent))

U, A, S = "user", "assistant", "system"
CONVERSATIONS = {
    "one question": [(U, "Hello")],
    "several turns": [(U, "Hello"), (A, "Hi, how are you?"), (U, "Well.  And you?"), (A, "Fine"), (U, "Good")],
    "system prompt": [(S, "Be brief."), (U, "Who are you?")],
    "system prompt and turns": [(S, "Be brief."), (U, "a"), (A, "b"), (U, "c"), (A, "d"), (U, "e")],
    "two system prompts": [(S, "One."), (S, "Two."), (U, "Go")],
    "a system prompt in the middle": [(U, "a"), (A, "b"), (U, "c"), (S, "Now in French."), (U, "d")],
    "two users in a row": [(U, "first"), (U, "second")],
    "control tokens as text": [(U, "what does [INST] mean, </s> and <s>?")],
    "multi-byte": [(S, "Répondez en 日本語 😀"), (U, "ça va?\n\n\tоk ")],
    "blank": [(U, ""), (A, "Say something"), (U, " ")],
    "answer with trailing spaces": [(U, "a"), (A, "b   "), (U, "c")],
}


def reference(version: str, conversation: list[tuple[str, str]], *, prefix: bool = False) -> list[int]:
    kinds = {U: mistral.UserMessage, A: mistral.AssistantMessage, S: mistral.SystemMessage}
    messages = [kinds[role](content=text) for role, text in conversation]
    if prefix:
        messages[-1].prefix = True
    return REFERENCES[version].encode_chat_completion(ChatCompletionRequest(messages=messages)).tokens


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("version", TEMPLATES)
def test_ids_equal_mistral_commons(version: str, name: str) -> None:
    conversation = CONVERSATIONS[name]
    prompt = TEMPLATES[version].encode([Message(role, text) for role, text in conversation])
    assert prompt.token_ids == reference(version, conversation)
    assert prompt.continues == []


@pytest.mark.parametrize("version", TEMPLATES)
def test_a_prefix_is_continued(version: str) -> None:
    conversation = [(U, "Count"), (A, "One, two")]
    prompt = TEMPLATES[version].encode([Message(U, "Count"), Message(A, "One, two", prefix=True)])
    assert prompt.token_ids == reference(version, conversation, prefix=True)
    assert prompt.continues
    assert prompt.token_ids[-len(prompt.continues) :] == prompt.continues
    assert prompt.token_ids[-1] != 2


# Written out by hand, so that a change in mistral-common shows too. Pieces joined by "|".
@pytest.mark.parametrize(
    ("version", "pieces"),
    [
        ("v1", "<s>|▁[|INST|]|▁S|<0x0A>|<0x0A>|a|▁[|/|INST|]|▁b|</s>|▁[|INST|]|▁c|▁[|/|INST|]"),
        ("v2", "<s>|[INST]|▁a|[/INST]|▁b|</s>|[INST]|▁S|<0x0A>|<0x0A>|c|[/INST]"),
        ("v3", "<s>|[INST]|▁a|[/INST]|▁b|</s>|[INST]|▁S|<0x0A>|<0x0A>|c|[/INST]"),
    ],
)
def test_pinned_pieces(version: str, pieces: str) -> None:
    names = open_tokenizer(PATHS[version], version).pieces.names
    prompt = TEMPLATES[version].encode([Message(S, "S"), Message(U, "a"), Message(A, "b"), Message(U, "c")])
    assert "|".join(names[i] for i in prompt.token_ids) == pieces


@pytest.mark.parametrize("version", ["v1", "v2", "v3"])
def test_a_plain_file_name_works_with_any_version(tmp_path: Path, version: str) -> None:
    shutil.copy(PATHS[version], tmp_path / "tokenizer.model")
    template = MistralTemplate(load_tokenizer(tmp_path, version=version))
    prompt = template.encode([Message(S, "Be brief."), Message(U, "a"), Message(A, "b"), Message(U, "c")])
    assert prompt.token_ids == reference(version, [(S, "Be brief."), (U, "a"), (A, "b"), (U, "c")])


def test_a_template_needs_its_control_tokens() -> None:
    with pytest.raises(ConfigError, match=r"v3 needs the control tokens \[INST\]"):
        MistralTemplate(open_tokenizer(PATHS["v1"], "v3"))


@pytest.mark.parametrize("version", TEMPLATES)
@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([Message(A, "Hi")], "must start with a user message or system message"),
        ([Message(U, "a"), Message(A, "b", prefix=True), Message(U, "c")], "must be last message"),
        ([Message(U, "a"), Message(A, "b"), Message(S, "c"), Message(U, "d")], "Unexpected role 'system' after role"),
        ([Message(U, "half \ud83d")], "not valid Unicode"),
    ],
)
def test_refused_conversations(version: str, messages: list[Message], says: str) -> None:
    with pytest.raises(RequestError, match=says) as error:
        TEMPLATES[version].encode(messages)
    assert error.value.param == "messages"


TOOLS = [
    ToolDefinition("get_weather", "The weather", {"type": "object", "properties": {"city": {"type": "string"}}}),
    ToolDefinition("add", parameters={"type": "object", "properties": {"é": {"type": "integer"}}}, strict=True),
]
MISTRAL_TOOLS = [
    mistral_tools.Tool(function=mistral_tools.Function(name=t.name, description=t.description, parameters=t.parameters))
    for t in TOOLS
]
CALL = ToolCall("abcDEF123", "get_weather", '{"city":"Rome",  "x": "é"}')
MISTRAL_CALL = mistral_tools.ToolCall(
    id=CALL.id, function=mistral_tools.FunctionCall(name=CALL.name, arguments=CALL.arguments)
)


@pytest.mark.parametrize("version", ["v2", "v3", "demo"])
@pytest.mark.parametrize("ending", ["question", "result", "later question"])
def test_tools_and_results_equal_mistral_commons(version: str, ending: str) -> None:
    ours = [Message(S, "Be brief."), Message(U, "Weather?")]
    theirs = [mistral.SystemMessage(content="Be brief."), mistral.UserMessage(content="Weather?")]
    if ending != "question":
        ours += [Message(A, tool_calls=[CALL]), Message("tool", '{"t": 21}', tool_call_id=CALL.id)]
        theirs += [
            mistral.AssistantMessage(content=None, tool_calls=[MISTRAL_CALL]),
            mistral.ToolMessage(content='{"t": 21}', tool_call_id=CALL.id, name=CALL.name),
        ]
    if ending == "later question":
        ours += [Message(A, "21 degrees"), Message(U, "Thanks")]
        theirs += [mistral.AssistantMessage(content="21 degrees"), mistral.UserMessage(content="Thanks")]
    request = ChatCompletionRequest(messages=theirs, tools=MISTRAL_TOOLS)
    assert TEMPLATES[version].supports_tools
    assert (
        TEMPLATES[version].encode(ours, tools=TOOLS).token_ids
        == REFERENCES[version].encode_chat_completion(request).tokens
    )


def test_ids_of_other_servers_still_match() -> None:
    conversation = [
        Message(U, "a"),
        Message(A, tool_calls=[ToolCall("call_1", "add", "{}"), ToolCall("call_2", "add", '{"é": 1}')]),
        Message("tool", "plain text", tool_call_id="call_2"),
        Message("tool", "[1, 2]", tool_call_id="call_1"),
    ]
    prompt = TEMPLATES["v3"].encode(conversation, tools=TOOLS)
    text = open_tokenizer(PATHS["v3"], "v3").decode(prompt.token_ids)
    for call_id in ("call_1", "call_2"):
        assert call_id not in text
        assert text.count(mistral_id(call_id)) == 2, "once in the call, once in its result"


ASKED = [Message(U, "a"), Message(A, tool_calls=[CALL])]


def called(name: str, arguments: str) -> list[Message]:
    return [Message(U, "a"), Message(A, tool_calls=[ToolCall("i", name, arguments)]), result("x", "i")]


def result(content: str, call_id: str | None = CALL.id) -> Message:
    return Message("tool", content, tool_call_id=call_id)


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([Message(U, "a"), result("x")], "'tool_call_id' to a call in the assistant message"),
        ([*ASKED, result("x", "abcDEF124")], "does not answer an open tool call"),
        ([*ASKED, result("x", None)], "does not answer an open tool call"),
        ([*ASKED, result("x"), result("x")], "does not answer an open tool call"),
        ([*ASKED, Message(U, "b")], "has no result"),
        (ASKED, "ends with a tool call that has no result"),
        ([Message(U, "a"), Message(A, tool_calls=[CALL], prefix=True)], "'prefix' has tool calls"),
        ([Message(U, "a"), Message(A, tool_calls=[CALL, CALL])], "the same id"),
        (called("a b", "{}"), "Function name"),
        (called("f", "\ud83d"), "not valid Unicode"),
        ([*ASKED, result(r'"\ud83d"')], "not valid Unicode"),
        ([*ASKED, result("9" * 5000)], "cannot be parsed"),
        ([*ASKED, result("[" * 100_000)], "nested too deeply"),
    ],
)
def test_refused_tool_messages(messages: list[Message], says: str) -> None:
    with pytest.raises(RequestError, match=says) as error:
        TEMPLATES["v3"].encode(messages, tools=TOOLS)
    assert error.value.param == "messages"


@pytest.mark.parametrize(
    ("version", "tool", "says"),
    [
        ("v1", TOOLS[0], "does not support tools"),
        ("v3", ToolDefinition("a.b"), "Function name was a.b"),
        ("v3", ToolDefinition("f", parameters={"type": "nothing"}), "Invalid tool schema"),
    ],
)
def test_refused_tools(version: str, tool: ToolDefinition, says: str) -> None:
    with pytest.raises(RequestError, match=says) as error:
        TEMPLATES[version].encode([Message(U, "a")], tools=[tool])
    assert error.value.param == "tools"
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("before", "system"),
    [
        ([Message(U, "a")], SAFE_PROMPT),
        ([Message(S, "Own."), Message(U, "a")], f"{SAFE_PROMPT}\n\nOwn."),
        ([Message(S, ""), Message(U, "a")], SAFE_PROMPT),
    ],
)
def test_the_safe_prompt_comes_first(before: list[Message], system: str) -> None:
    assert with_safe_prompt(before) == [Message(S, system), Message(U, "a")]
    assert TEMPLATES["v3"].encode(with_safe_prompt(before)).token_ids == reference("v3", [(S, system), (U, "a")])
