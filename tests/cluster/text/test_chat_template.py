"""Templates v1, v2 and v3: our ids equal those of mistral-common's own tokenizers, and pinned texts."""

import shutil
from pathlib import Path

import mistral_common
import pytest
from mistral_common.protocol.instruct import messages as mistral
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from cluster.text.chat import ChatTemplate, Message
from cluster.text.tokenizer import Tokenizer, load_tokenizer
from workers.errors import ConfigError, RequestError

DATA = Path(mistral_common.__file__).parent / "data"
DEMO = Path(__file__).parents[3] / "examples" / "demo_model" / "tokenizer.model.v3"
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
TEMPLATES = {version: ChatTemplate(Tokenizer(path, version)) for version, path in PATHS.items()}
TEMPLATES["demo"] = ChatTemplate(load_tokenizer(DEMO.parent))

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
    sp = Tokenizer(PATHS[version], version).sp
    prompt = TEMPLATES[version].encode([Message(S, "S"), Message(U, "a"), Message(A, "b"), Message(U, "c")])
    assert "|".join(sp.id_to_piece(i) for i in prompt.token_ids) == pieces


@pytest.mark.parametrize("version", ["v1", "v2", "v3"])
def test_a_plain_file_name_takes_any_version(tmp_path: Path, version: str) -> None:
    shutil.copy(PATHS[version], tmp_path / "tokenizer.model")
    template = ChatTemplate(load_tokenizer(tmp_path, version=version))
    prompt = template.encode([Message(S, "Be brief."), Message(U, "a"), Message(A, "b"), Message(U, "c")])
    assert prompt.token_ids == reference(version, [(S, "Be brief."), (U, "a"), (A, "b"), (U, "c")])


def test_a_template_needs_its_control_tokens() -> None:
    with pytest.raises(ConfigError, match=r"v3 needs the control tokens \[INST\]"):
        ChatTemplate(Tokenizer(PATHS["v1"], "v3"))


@pytest.mark.parametrize("version", TEMPLATES)
@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([Message(S, "only this")], "no user message"),
        ([Message(A, "Hi")], "no user message"),
        ([Message(U, "a"), Message(A, "b")], "last message is the assistant's"),
        ([Message(U, "a"), Message(A, ""), Message(U, "b")], "assistant message needs content"),
        ([Message(U, "a"), Message(A, "b", prefix=True), Message(U, "c")], "must be last message"),
        ([Message(U, "a"), Message(A, "b"), Message(S, "c"), Message(U, "d")], "Unexpected role 'system' after role"),
        ([Message(U, "half \ud83d")], "not valid Unicode"),
    ],
)
def test_refused_conversations(version: str, messages: list[Message], says: str) -> None:
    with pytest.raises(RequestError, match=says) as error:
        TEMPLATES[version].encode(messages)
    assert error.value.param == "messages"
