"""From the body of /v1/messages to that of chat, which checks and encodes it. Knows both bodies' fields.

A message of the user may hold results of tools and text: each result becomes a message of its own, as chat has it.
"""

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

from cluster.api.context import ApiContext
from cluster.api.generation.field_names import renamed
from cluster.api.request_context import RequestContext
from cluster.api.schemas.chat import (
    AssistantMessage,
    ChatMessage,
    ChatRequest,
    FunctionCall,
    FunctionChoice,
    NamedToolChoice,
    SystemMessage,
    TextPart,
    ToolCall,
    ToolMessage,
    UserMessage,
    function_tool,
)
from cluster.api.schemas.messages.request import (
    DocumentBlockInput,
    ImageBlockInput,
    MessageInput,
    MessagePrompt,
    MessageRequest,
    TextBlockInput,
    ToolResultBlockInput,
    ToolUseBlockInput,
)
from cluster.api.schemas.structured import JsonSchemaFormat, SchemaFormat
from cluster.api.server.errors import THREADS_UNSUPPORTED
from workers.errors import RequestError

_CHAT_NAMES = {
    "stop": "stop_sequences",
    "response_format": "output_config",
    "max_completion_tokens": "max_tokens",
    "tool_call_id": "tool_use_id",
}


def in_own_names() -> AbstractContextManager[None]:
    """Errors of chat name the fields of a message."""
    return renamed(_CHAT_NAMES, result="block of type 'tool_result'")


def chat_request(body: MessageRequest) -> ChatRequest:
    """Raises RequestError for what is not text."""
    metadata = body.metadata
    return ChatRequest(
        messages=to_messages(body),
        stream=bool(body.stream),
        max_tokens=body.max_tokens,
        stop=body.stop_sequences,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        user=None if metadata is None else metadata.user_id,
        seed=body.seed,
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        ignore_eos=body.ignore_eos,
        priority=body.priority,
        **prompt_fields(body),
    )


def prompt_fields(body: MessagePrompt) -> dict[str, Any]:
    """The fields of chat, other than the messages, that decide the prompt and the form of the answer. Raises RequestError."""
    choice, output = body.tool_choice, body.output_config
    if choice is not None and choice.type == "tool" and choice.name is None:
        raise RequestError("'tool_choice' names no tool.", remedy="Send its 'name'.", param="tool_choice")
    named = choice is not None and choice.type == "tool"
    return {
        "model": body.model,
        "tools": [
            function_tool(tool.name, tool.input_schema, description=tool.description, strict=tool.strict)
            for tool in body.tools or []
        ]
        or None,
        "tool_choice": None
        if choice is None
        else NamedToolChoice(function=FunctionChoice(name=choice.name or ""))
        if named
        else choice.type,
        "parallel_tool_calls": False if choice is not None and choice.disable_parallel_tool_use else None,
        "response_format": None
        if output is None or output.format is None
        else SchemaFormat(json_schema=JsonSchemaFormat(name="output", schema=output.format.schema)),
    }


def to_messages(body: MessagePrompt) -> list[ChatMessage]:
    """The conversation for the chat template. Raises RequestError for what is not text."""
    if body.thread is not None:
        raise RequestError(
            "'thread' is not supported: this server keeps no conversations.",
            remedy="Remove it, and send the whole conversation as 'messages'.",
            param="thread",
            code=THREADS_UNSUPPORTED,
        )
    messages: list[ChatMessage] = []
    if body.system:
        messages.append(SystemMessage(content=_texts(body.system)))
    for message in body.messages:
        messages += list(_convert(message))
    if not messages:
        raise RequestError(
            "'messages' holds nothing to answer: its blocks are missing, or only thoughts.",
            remedy="Send a message with text.",
            param="messages",
        )
    last = messages[-1]
    if isinstance(last, AssistantMessage) and not last.tool_calls:
        messages[-1] = AssistantMessage(content=last.content, prefix=True)
    return messages


def note_ignored(api: ApiContext, body: MessagePrompt, context: RequestContext) -> None:
    """Notes fields that have no effect. Raises RequestError if the server is strict."""
    if body.thinking is not None and body.thinking.type != "disabled":
        api.ignore(context, thinking=True)
    if body.output_config is not None:
        api.ignore(context, **{"output_config.effort": body.output_config.effort})


def _convert(message: MessageInput) -> Iterator[ChatMessage]:
    blocks = [TextBlockInput(text=message.content)] if isinstance(message.content, str) else message.content
    parts: list[str | TextPart] = []
    calls = []
    for block in blocks:
        match block:
            case TextBlockInput():
                parts.append(TextPart(text=block.text))
            case ToolUseBlockInput():
                _belongs_to("assistant", block, message)
                arguments = json.dumps(block.input, ensure_ascii=False)
                calls.append(ToolCall(id=block.id, function=FunctionCall(name=block.name, arguments=arguments)))
            case ToolResultBlockInput():
                _belongs_to("user", block, message)
                content = block.content or ""
                yield ToolMessage(tool_call_id=block.tool_use_id, content=_texts(content))
            case ImageBlockInput() | DocumentBlockInput():
                raise _not_text(block)
    if message.role == "assistant":
        yield AssistantMessage(content=list(parts) or None, tool_calls=calls or None)
    elif parts or not isinstance(message.content, list):
        kind = UserMessage if message.role == "user" else SystemMessage
        yield kind(content=list(parts))


def _belongs_to(role: str, block: ToolUseBlockInput | ToolResultBlockInput, message: MessageInput) -> None:
    if message.role != role:
        kind = block.__struct_config__.tag
        raise RequestError(
            f"A message of role '{message.role}' has a block of type '{kind}'.",
            remedy=f"Put it into a message of role '{role}'.",
            param="messages",
        )


def _texts(content: str | list[TextBlockInput] | list[Any]) -> str | list[Any]:
    if isinstance(content, str):
        return content
    for block in content:
        if not isinstance(block, TextBlockInput):
            raise _not_text(block)
    return [TextPart(text=block.text) for block in content]


def _not_text(block: ImageBlockInput | DocumentBlockInput) -> RequestError:
    return RequestError(
        f"The model reads text only: blocks of type '{block.__struct_config__.tag}' are not supported.",
        remedy="Send text.",
        param="messages",
        code="unsupported_content",
    )
