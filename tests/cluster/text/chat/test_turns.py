"""Conversations as clients send them: several parts, empty answers, text with calls, no question, an answer at the end.

The references are mistral-common's own tokenizers. Where these refuse a conversation, the ids are written out.
"""

from pathlib import Path

import mistral_common
import pytest
from mistral_common.protocol.instruct import messages as mistral
from mistral_common.protocol.instruct import tool_calls as mistral_tools
from mistral_common.protocol.instruct.chunk import TextChunk
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from support.paths import DEMO_MODEL

from cluster.text.chat.mistral_template import MistralTemplate
from cluster.text.chat.safe_prompt import SAFE_PROMPT, with_safe_prompt
from cluster.text.chat.template import Message
from cluster.text.tokenizer import load_tokenizer, open_tokenizer
from cluster.text.tools.definitions import ToolCall

DATA = Path(mistral_common.__file__).parent / "data"
TEMPLATES = {
    "v1": MistralTemplate(open_tokenizer(DATA / "tokenizer.model.v1", "v1")),
    "v2": MistralTemplate(open_tokenizer(DATA / "mistral_instruct_tokenizer_240216.model.v2", "v2")),
    "v3": MistralTemplate(open_tokenizer(DATA / "mistral_instruct_tokenizer_240323.model.v3", "v3")),
    "demo": MistralTemplate(load_tokenizer(DEMO_MODEL)),
}
REFERENCES = {
    "v1": MistralTokenizer.v1(),
    "v2": MistralTokenizer.v2(),
    "v3": MistralTokenizer.v3(),
    "demo": MistralTokenizer.from_file(str(DEMO_MODEL / "tokenizer.model.v3")),
}
KINDS = {"user": mistral.UserMessage, "assistant": mistral.AssistantMessage, "system": mistral.SystemMessage}
U, A, S = "user", "assistant", "system"
EOS = 2


def reference(version: str, messages: list[Message]) -> list[int]:
    theirs = [
        KINDS[m.role](
            content=m.content if isinstance(m.content, str) else [TextChunk(text=t) for t in m.content],
            **({"prefix": True} if m.prefix else {}),
        )
        for m in messages
    ]
    return REFERENCES[version].encode_chat_completion(ChatCompletionRequest(messages=theirs)).tokens


PARTS = ("alpha", "beta")
CONVERSATIONS = {
    "user parts": [Message(U, PARTS)],
    "three parts": [Message(U, ("a", "b\n", "c"))],
    "an empty part": [Message(U, ("", "a", ""))],
    "system parts": [Message(S, PARTS), Message(U, "a")],
    "assistant parts": [Message(U, "a"), Message(A, PARTS), Message(U, ("b", "c"))],
    "parts in two messages": [Message(U, PARTS), Message(U, PARTS)],
    "a prefix of parts": [Message(U, "a"), Message(A, PARTS, prefix=True)],
    "only a system message": [Message(S, "Be brief.")],
    "only system messages": [Message(S, "Be brief."), Message(S, PARTS)],
    "an empty question": [Message(U, "")],
}


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("version", TEMPLATES)
def test_ids_equal_mistral_commons(version: str, name: str) -> None:
    messages = CONVERSATIONS[name]
    assert TEMPLATES[version].encode(messages).token_ids == reference(version, messages)


def test_the_ids_of_the_report() -> None:
    assert TEMPLATES["demo"].encode([Message(U, PARTS)]).token_ids == [1, 3, 480, 4022, 2015, 10, 10, 4033, 3612, 4]


def parts_of(version: str, *texts: str) -> list[list[int]]:
    """Each text as a user's turn, without BOS."""
    return [reference(version, [Message(U, text)])[1:] for text in texts]


@pytest.mark.parametrize("version", TEMPLATES)
def test_an_empty_answer_is_an_empty_turn(version: str) -> None:
    a, b = parts_of(version, "a", "b")
    encode = TEMPLATES[version].encode
    assert encode([Message(U, "a"), Message(A, ""), Message(U, "b")]).token_ids == [1, *a, EOS, *b]
    assert encode([Message(U, "a"), Message(A, ""), Message(A, ()), Message(U, "b")]).token_ids == [1, *a, EOS, *b]
    assert encode([Message(U, "a"), Message(A, "")]).token_ids == [1, *a, EOS]
    answered = [Message(U, "a"), Message(A, "c"), Message(U, "b")]
    twice = [Message(U, "a"), Message(A, ""), Message(A, "c"), Message(U, "b")]
    assert encode(twice).token_ids == reference(version, answered), "answers in a row are one turn"


@pytest.mark.parametrize("version", TEMPLATES)
def test_an_empty_prefix_continues_nothing(version: str) -> None:
    prompt = TEMPLATES[version].encode([Message(U, "a"), Message(A, "", prefix=True)])
    assert prompt.token_ids == reference(version, [Message(U, "a")])
    assert prompt.continues == []


@pytest.mark.parametrize("version", TEMPLATES)
@pytest.mark.parametrize("content", ["b", PARTS])
def test_an_answer_at_the_end_is_a_turn_that_has_ended(version: str, content: str | tuple[str, ...]) -> None:
    answer = Message(A, content)
    prompt = TEMPLATES[version].encode([Message(U, "a"), answer])
    prefix = TEMPLATES[version].encode([Message(U, "a"), Message(A, content, prefix=True)])
    assert prompt.token_ids == [*prefix.token_ids, EOS]
    assert prompt.continues == []


CALL = ToolCall("abcDEF123", "add", '{"x": 1}')
RESULT = Message("tool", "2", tool_call_id=CALL.id)


@pytest.mark.parametrize("version", ["v2", "v3", "demo"])
@pytest.mark.parametrize("text", ["Let me see", PARTS])
def test_text_comes_before_its_calls(version: str, text: str | tuple[str, ...]) -> None:
    """The order of mistral-common's version 7."""
    encode = TEMPLATES[version].encode
    question = encode([Message(U, "a")]).token_ids
    said = encode([Message(U, "a"), Message(A, text, prefix=True)]).token_ids[len(question) :]
    called = encode([Message(U, "a"), Message(A, tool_calls=[CALL]), RESULT]).token_ids[len(question) :]
    prompt = encode([Message(U, "a"), Message(A, text, tool_calls=[CALL]), RESULT])
    assert prompt.token_ids == [*question, *said, *called]
    split = [Message(U, "a"), Message(A, text), Message(A, tool_calls=[CALL]), RESULT]
    assert encode(split).token_ids == prompt.token_ids, "the same as two messages"


def test_the_order_is_that_of_a_later_version() -> None:
    v7 = MistralTokenizer.v7()
    call = mistral_tools.ToolCall(
        id=CALL.id, function=mistral_tools.FunctionCall(name=CALL.name, arguments=CALL.arguments)
    )
    messages = [
        mistral.UserMessage(content="a"),
        mistral.AssistantMessage(content="Let me see", tool_calls=[call]),
        mistral.ToolMessage(content="2", tool_call_id=CALL.id),
    ]
    text = v7.decode(v7.encode_chat_completion(ChatCompletionRequest(messages=messages)).tokens)
    tokenizer = open_tokenizer(DATA / "mistral_instruct_tokenizer_240323.model.v3", "v3")
    ours = tokenizer.decode(
        TEMPLATES["v3"].encode([Message(U, "a"), Message(A, "Let me see", tool_calls=[CALL]), RESULT]).token_ids
    )
    assert text.index("Let me see") < text.index('"add"')
    assert ours.index("Let me see") < ours.index('"add"')


def test_v2_leaves_out_the_calls_of_earlier_turns() -> None:
    encode = TEMPLATES["v2"].encode
    later = [Message(A, "2"), Message(U, "Thanks")]
    with_calls = [Message(U, "a"), Message(A, "Let me see", tool_calls=[CALL]), RESULT, *later]
    a, thanks = parts_of("v2", "a", "Thanks")
    text = encode([Message(U, "a"), Message(A, "Let me see")]).token_ids[1 + len(a) :]
    answer = encode([Message(U, "a"), Message(A, "2")]).token_ids[1 + len(a) :]
    assert encode(with_calls).token_ids == [1, *a, *text, *answer, *thanks]


@pytest.mark.parametrize("content", ["Own.", ("Own.", "More."), ()])
def test_the_safe_prompt_comes_before_all_parts(content: str | tuple[str, ...]) -> None:
    messages = [Message(S, content), Message(U, "a")]
    rules = "\n\n".join([SAFE_PROMPT, *messages[0].texts])
    assert TEMPLATES["v3"].encode(with_safe_prompt(messages)).token_ids == reference(
        "v3", [Message(S, rules), Message(U, "a")]
    )
