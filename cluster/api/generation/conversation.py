"""From a body's messages and tools to the prompt's token ids, through the model's chat template.

Knows the message types of the API and of cluster/text/chat/template.py; knows nothing about generation.
"""

from collections.abc import Sequence

from cluster.api.context import ApiContext
from cluster.api.generation.prompts import check_text_length, in_thread_if_long
from cluster.api.schemas.chat import AssistantMessage, ChatMessage, Tool, ToolMessage, UserMessage
from cluster.text.chat.safe_prompt import with_safe_prompt
from cluster.text.chat.template import ChatPrompt, Message
from cluster.text.tools.definitions import ToolCall, ToolDefinition
from workers.errors import RequestError


async def encode_conversation(
    api: ApiContext,
    messages: Sequence[ChatMessage],
    *,
    tools: Sequence[Tool] = (),
    safe_prompt: bool = False,
    truncates: bool = False,
) -> ChatPrompt:
    """Raises RequestError for a conversation that the template does not allow or that can never fit.

    truncates: the ids will be truncated, so any length fits.
    """
    template = api.chat_template
    if template is None:
        raise RequestError("This model has no chat template.", remedy="Use /v1/completions.", param="messages")
    converted = to_messages(messages)
    if safe_prompt:
        converted = with_safe_prompt(converted)
    definitions = to_definitions(tools)
    num_chars = sum(len(m.content) for m in converted)
    if not truncates:
        check_text_length(num_chars, api.tokenizer, param="messages", facts=api.router.facts)
    num_chars += 100 * len(converted) + 1000 * len(definitions)
    return await in_thread_if_long(num_chars, lambda: template.encode(converted, tools=definitions))


def to_messages(messages: Sequence[ChatMessage]) -> list[Message]:
    """Messages for the template: text parts joined, `developer` as `system`."""
    return [_convert(message) for message in messages]


def to_definitions(tools: Sequence[Tool]) -> list[ToolDefinition]:
    """Tools for the template."""
    return [
        ToolDefinition(
            name=tool.function.name,
            description=tool.function.description or "",
            parameters=tool.function.parameters or {"type": "object", "properties": {}},
            strict=bool(tool.function.strict),
        )
        for tool in tools
    ]


def _convert(message: ChatMessage) -> Message:
    content = message.content or ""
    text = content if isinstance(content, str) else "".join(part.text for part in content)
    match message:
        case UserMessage():
            return Message("user", text)
        case ToolMessage():
            return Message("tool", text, name=message.name, tool_call_id=message.tool_call_id)
        case AssistantMessage():
            calls = tuple(ToolCall(c.id, c.function.name, c.function.arguments) for c in message.tool_calls or ())
            return Message("assistant", text, prefix=bool(message.prefix), tool_calls=calls)
    return Message("system", text)
