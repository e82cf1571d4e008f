"""Conversations and what turns them into token ids: the interface of every chat template, and the rules they share.

Knows roles, tools and which conversations are valid for every template. Does not know any particular template (mistral_template.py,
jinja_template.py), HTTP, or how the answer's ids become text again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from cluster.text.tools.definitions import ToolCall, ToolDefinition
from workers.errors import RequestError

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True, slots=True)
class Message:
    """A message of a conversation.

    prefix: the last, assistant message is to be continued by the answer. tool_calls: of assistant messages only. tool_call_id: the call
    that a tool message answers; it may repeat the tool's `name`.
    """

    role: Role
    content: str = ""
    prefix: bool = False
    name: str | None = None
    tool_calls: Sequence[ToolCall] = ()
    tool_call_id: str | None = None


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """`continues`: the ids at the end of the prompt whose text the answer continues: those of a prefix, otherwise none."""

    token_ids: list[int]
    continues: list[int]


class ChatTemplate(Protocol):
    """Writes conversations for one tokenizer. `encode` may run in a thread."""

    @property
    def supports_tools(self) -> bool: ...

    @property
    def supports_prefix(self) -> bool: ...

    def encode(self, messages: Sequence[Message], *, tools: Sequence[ToolDefinition] = ()) -> ChatPrompt:
        """The conversation's ids, including the beginning-of-sequence token. Raises RequestError if the template does not allow it."""
        ...


def check_conversation(messages: Sequence[Message]) -> None:
    """Checks what every template requires: a user message, and a result for every tool call. Raises RequestError."""
    if not any(m.role == "user" for m in messages):
        raise RequestError("The conversation has no user message.", remedy="Add one.", param="messages")
    open_calls: dict[str, bool] = {}  # by id, those of the last assistant message with calls: whether each has a result
    for i, message in enumerate(messages):
        for text in (message.content, *(part for call in message.tool_calls for part in (call.name, call.arguments))):
            if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
                raise invalid_unicode()
        if message.role == "tool":
            if open_calls.get(message.tool_call_id or "") is not False:
                raise RequestError(
                    f"messages[{i}]: a tool result does not answer an open tool call.",
                    remedy="Set its 'tool_call_id' to a call in the assistant message before it that has no result yet.",
                    param="messages",
                )
            open_calls[message.tool_call_id or ""] = True
            continue
        if not all(open_calls.values()):
            raise RequestError(
                f"messages[{i}]: a tool call before it has no result.",
                remedy="Add a message of role 'tool' for each call.",
                param="messages",
            )
        open_calls = {call.id: False for call in message.tool_calls}
        if len(open_calls) < len(message.tool_calls):
            raise RequestError(
                f"messages[{i}]: two tool calls have the same id.",
                remedy="Give each call its own id.",
                param="messages",
            )
        if message.role == "assistant" and not message.content and not message.tool_calls:
            raise RequestError(
                f"messages[{i}]: an assistant message has neither content nor tool calls.",
                remedy="Give it one of them, or remove it.",
                param="messages",
            )
    last = messages[-1]
    if last.role == "assistant" and not last.prefix:
        raise RequestError(
            "The last message is an assistant message.",
            remedy="End with a user message, or set its 'prefix' to true to continue it.",
            param="messages",
        )
    if last.prefix and last.tool_calls:
        raise RequestError("A message with 'prefix' has tool calls.", remedy="Give it content only.", param="messages")


def invalid_unicode() -> RequestError:
    return RequestError(
        "A message is not valid Unicode: it contains half of a surrogate pair.", remedy="Remove it.", param="messages"
    )
