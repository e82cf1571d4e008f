"""Conversations and what turns them into token ids: the interface of every chat template, and the rules they share.

Knows roles, tools and which conversations are valid for every template. Does not know any particular template (mistral_template.py,
jinja_template.py), HTTP, or how the answer's ids become text again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from cluster.text.tools.calls import CallFormat
from cluster.text.tools.definitions import ToolCall, ToolDefinition
from workers.errors import RequestError

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True, slots=True)
class Message:
    """A message of a conversation. `content` may have several parts.

    prefix: the last, assistant message is to be continued by the answer. tool_calls: of assistant messages only. tool_call_id: the call
    that a tool message answers; it may repeat the tool's `name`. Other messages may have their author's `name`.
    """

    role: Role
    content: str | tuple[str, ...] = ""
    prefix: bool = False
    name: str | None = None
    tool_calls: Sequence[ToolCall] = ()
    tool_call_id: str | None = None

    @property
    def texts(self) -> tuple[str, ...]:
        """The parts of the content that are not empty."""
        parts = (self.content,) if isinstance(self.content, str) else self.content
        return tuple(part for part in parts if part)


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """`continues`: the ids at the end of the prompt whose text the answer continues: those of a prefix, otherwise none."""

    token_ids: list[int]
    continues: list[int]


@dataclass(frozen=True, slots=True)
class TemplateOptions:
    """How a template is applied. Mistral's templates have no such choices.

    add_generation_prompt: whether the prompt ends with the beginning of the assistant's turn. variables: the client's, for the template.
    """

    add_generation_prompt: bool = True
    variables: Mapping[str, Any] = field(default_factory=dict)


DEFAULT_OPTIONS = TemplateOptions()


class ChatTemplate(Protocol):
    """Writes conversations for one tokenizer. `encode` may run in a thread."""

    @property
    def supports_tools(self) -> bool: ...

    @property
    def call_format(self) -> CallFormat:
        """How the model writes tool calls, if it supports tools."""
        ...

    @property
    def supports_prefix(self) -> bool: ...

    @property
    def source(self) -> str | None:
        """The Jinja source, for clients that write conversations themselves; None for a template that is not in Jinja."""
        ...

    def reads(self, name: str) -> bool:
        """Whether the template reads a variable or a field of a message with this name, so that it may change the prompt."""
        ...

    def encode(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[ToolDefinition] = (),
        options: TemplateOptions = DEFAULT_OPTIONS,
    ) -> ChatPrompt:
        """The conversation's ids, including the beginning-of-sequence token. Raises RequestError if the template does not allow it."""
        ...


def check_tools(messages: Sequence[Message], tools: Sequence[ToolDefinition], *, supported: bool) -> None:
    """Raises RequestError for tools or tool calls that the template cannot write."""
    if not supported and (tools or any(m.tool_calls for m in messages)):
        raise RequestError(
            "This model's chat template does not support tools.",
            remedy="Remove 'tools' and tool calls from the request.",
            param="tools",
        )


def check_conversation(messages: Sequence[Message]) -> None:
    """Checks what every template requires: a result for every tool call. Raises RequestError.

    An assistant message may be empty: a generation may end at once. The conversation may end with one: the answer is a new turn.
    """
    open_calls: dict[str, bool] = {}  # by id, those of the last assistant message with calls: whether each has a result
    for i, message in enumerate(messages):
        for text in (*message.texts, *(part for call in message.tool_calls for part in (call.name, call.arguments))):
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
    last = messages[-1]
    if last.prefix and last.tool_calls:
        raise RequestError("A message with 'prefix' has tool calls.", remedy="Give it content only.", param="messages")
    if last.tool_calls:
        raise RequestError(
            "The conversation ends with a tool call that has no result.",
            remedy="Add a message of role 'tool' for each call.",
            param="messages",
        )


def invalid_unicode() -> RequestError:
    return RequestError(
        "A message is not valid Unicode: it contains half of a surrogate pair.", remedy="Remove it.", param="messages"
    )
