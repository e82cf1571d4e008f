"""From the items of a response's input to the messages of a conversation, and to the form in which they are stored and listed.

Knows the items' types and the messages of chat. An assistant's calls belong to the message before them, as chat templates have it.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import msgspec

from cluster.api.generation.field_names import renamed
from cluster.api.schemas.chat import (
    AssistantMessage,
    ChatMessage,
    Content,
    DeveloperMessage,
    FunctionCall,
    RefusalPart,
    SystemMessage,
    ToolCall,
    ToolMessage,
    UserMessage,
)
from cluster.api.schemas.responses.request import (
    Input,
    InputAudioPart,
    InputFilePart,
    InputFunctionCall,
    InputFunctionOutput,
    InputImagePart,
    InputItem,
    InputMessage,
    InputReasoning,
    Parts,
)
from cluster.responses.records import Stored, item_id
from workers.errors import RequestError

_MESSAGES: dict[str, type[UserMessage] | type[SystemMessage] | type[DeveloperMessage]] = {
    "user": UserMessage,
    "system": SystemMessage,
    "developer": DeveloperMessage,
}
_MEDIA = {InputImagePart: "images", InputFilePart: "files", InputAudioPart: "audio"}
# The fields of chat that a response has under other names.
_CHAT_NAMES = {
    "messages": "input",
    "response_format": "text",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "tool_call_id": "call_id",
}


def in_own_names() -> AbstractContextManager[None]:
    """Errors of chat name the fields of a response."""
    return renamed(_CHAT_NAMES, result="item of type 'function_call_output'")


def items_of(given: Input) -> list[InputItem]:
    """A text is one message of the user. Raises RequestError for what is not text."""
    items: list[InputItem] = [InputMessage(role="user", content=given)] if isinstance(given, str) else list(given)
    for item in items:
        _check_parts(item.content if isinstance(item, InputMessage) else getattr(item, "output", ""))
    return items


def items_before(chain: Sequence[Stored]) -> list[InputItem]:
    """Everything that was said in these responses, oldest first."""
    found: list[InputItem] = []
    for stored in chain:
        found += [msgspec.convert(item, InputItem) for item in stored.request.items]
        found += [msgspec.convert(msgspec.to_builtins(item), InputItem) for item in stored.record.output]
    return found


def to_messages(items: Sequence[InputItem], *, instructions: str | None) -> list[ChatMessage]:
    """The conversation for the chat template. Raises RequestError if there is none."""
    messages: list[ChatMessage] = [] if instructions is None else [SystemMessage(content=instructions)]
    calls: list[ToolCall] = []  # of the assistant's message that is open
    said: Content | None = None
    is_open = False

    def close() -> None:
        nonlocal said, is_open
        if is_open:
            messages.append(AssistantMessage(content=said, tool_calls=list(calls) or None))
        calls.clear()
        said, is_open = None, False

    for item in items:
        match item:
            case InputMessage(role="assistant"):
                close()
                said, is_open = _content(item.content), True
            case InputFunctionCall():
                is_open = True
                calls.append(ToolCall(id=item.call_id, function=FunctionCall(name=item.name, arguments=item.arguments)))
            case InputReasoning():
                continue
            case InputFunctionOutput():
                close()
                messages.append(ToolMessage(tool_call_id=item.call_id, content=_content(item.output)))
            case InputMessage():
                close()
                messages.append(_MESSAGES[item.role](content=_content(item.content)))
    close()
    if not messages:
        raise RequestError("'input' holds only thoughts.", remedy="Send a message too.", param="input")
    return messages


def shorter(items: Sequence[InputItem]) -> list[list[InputItem]]:
    """The conversation without its oldest turns, from longest to shortest. What the system says at its start is kept.

    A turn begins with a message of the user, so that no answer loses its question.
    """
    num_kept = 0
    while num_kept < len(items) and isinstance(first := items[num_kept], InputMessage):
        if first.role not in ("system", "developer"):
            break
        num_kept += 1
    starts = [
        i for i, item in enumerate(items) if i > num_kept and isinstance(item, InputMessage) and item.role == "user"
    ]
    return [[*items[:num_kept], *items[start:]] for start in starts]


def shown_items(items: Sequence[InputItem], response_id: str) -> list[dict[str, Any]]:
    """As they are stored and listed, each with an id."""
    return [_shown(item, item_id(response_id, "in", i)) for i, item in enumerate(items)]


def _check_parts(content: Parts) -> None:
    for part in () if isinstance(content, str) else content:
        what = _MEDIA.get(type(part))  # type: ignore[arg-type]  # no key for the other parts
        if what is not None:
            raise RequestError(
                f"The model reads text only: {what} ('{part.__struct_config__.tag}') are not supported.",
                remedy="Send text.",
                param="input",
                code="unsupported_content",
            )


def _content(content: Parts) -> Content:
    return content if isinstance(content, str) else list(content)  # type: ignore[arg-type]  # checked: only texts


def _shown(item: InputItem, new_id: str) -> dict[str, Any]:
    fields: dict[str, Any] = msgspec.to_builtins(item)
    fields = {name: value for name, value in fields.items() if value is not None}
    fields["id"] = item.id or new_id
    if isinstance(item, InputReasoning):
        return {"summary": [], **fields}
    fields["status"] = item.status or "completed"
    if isinstance(item, InputMessage):
        kind = "output_text" if item.role == "assistant" else "input_text"
        parts = item.content
        texts = (
            [parts]
            if isinstance(parts, str)
            else [p.refusal if isinstance(p, RefusalPart) else getattr(p, "text", "") for p in parts]
        )
        own: dict[str, Any] = {"annotations": []} if item.role == "assistant" else {}
        fields["content"] = [{"type": kind, "text": text, **own} for text in texts]
    return fields
