"""From a body's messages to the template's: parts stay apart, and a model without a template says so."""

from types import SimpleNamespace

import pytest

from cluster.api.generation.conversation import encode_conversation, to_messages
from cluster.api.schemas.chat import AssistantMessage, RefusalPart, SystemMessage, TextPart, ToolMessage, UserMessage
from cluster.text.chat.template import Message
from workers.errors import RequestError


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (UserMessage(content="a"), Message("user", "a")),
        (UserMessage(content=[TextPart(text="a"), TextPart(text="b")]), Message("user", ("a", "b"))),
        (UserMessage(content=["a", TextPart(text=""), TextPart(text="b")]), Message("user", ("a", "b"))),
        (UserMessage(content=[TextPart(text="a")]), Message("user", "a")),
        (SystemMessage(content=[TextPart(text="a"), TextPart(text="b")]), Message("system", ("a", "b"))),
        (AssistantMessage(content=None), Message("assistant")),
        (AssistantMessage(content=""), Message("assistant")),
        (AssistantMessage(content=[]), Message("assistant")),
        (AssistantMessage(content=[TextPart(text="a"), RefusalPart(refusal="b")]), Message("assistant", ("a", "b"))),
        (AssistantMessage(refusal="No."), Message("assistant", "No.")),
        (ToolMessage(tool_call_id="i", content=None), Message("tool", tool_call_id="i")),
    ],
)
def test_messages(body: object, message: Message) -> None:
    assert to_messages([body]) == [message]  # type: ignore[list-item]


async def test_a_model_that_cannot_chat_says_so() -> None:
    api = SimpleNamespace(chat_template=None)
    with pytest.raises(RequestError, match=r"This model has no chat template\.") as error:
        await encode_conversation(api, [UserMessage(content="a")])  # type: ignore[arg-type]
    assert error.value.param == "messages"
