"""From a body's messages and tools to the prompt's token ids, through the model's chat template.

Knows the message types of the API and of cluster/text/chat/template.py; knows nothing about generation.
"""

from collections.abc import Sequence
from dataclasses import replace

from cluster.api.context import ApiContext
from cluster.api.generation.prompts import check_text_length, in_thread_if_long
from cluster.api.schemas.chat import AssistantMessage, ChatMessage, Tool, ToolMessage, UserMessage, texts_of
from cluster.text.chat.safe_prompt import with_safe_prompt
from cluster.text.chat.template import DEFAULT_OPTIONS, ChatPrompt, Message, TemplateOptions
from cluster.text.tools.definitions import ToolCall, ToolDefinition
from workers.errors import RequestError


async def encode_conversation(
    api: ApiContext,
    messages: Sequence[ChatMessage],
    *,
    tools: Sequence[Tool] = (),
    safe_prompt: bool = False,
    continue_final: bool = False,
    options: TemplateOptions = DEFAULT_OPTIONS,
    truncates: bool = False,
) -> ChatPrompt:
    """Raises RequestError for a conversation that the template does not allow or that can never fit.

    continue_final: the last message is a prefix of the response. truncates: the ids will be truncated, so any length fits.
    """
    template = api.chat_template
    if template is None:
        raise RequestError(
            "This model has no chat template.",
            remedy="Use /v1/completions, or start the server with --chat-template.",
            param="messages",
        )
    converted = to_messages(messages)
    if continue_final:
        converted[-1] = _as_prefix(converted[-1])
    if safe_prompt:
        converted = with_safe_prompt(converted)
    definitions = to_definitions(tools)
    num_chars = sum(len(text) for m in converted for text in m.texts)
    if not truncates:
        check_text_length(num_chars, api.tokenizer, param="messages", facts=api.router.facts)
    num_chars += 100 * len(converted) + 1000 * len(definitions)
    return await in_thread_if_long(num_chars, lambda: template.encode(converted, tools=definitions, options=options))


def to_messages(messages: Sequence[ChatMessage]) -> list[Message]:
    """Messages for the template, with their text parts, `developer` as `system`."""
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
    texts = tuple(text for text in texts_of(message.content) if text)
    content = texts if len(texts) > 1 else "".join(texts)
    match message:
        case UserMessage():
            return Message("user", content, name=message.name)
        case ToolMessage():
            return Message("tool", content, name=message.name, tool_call_id=message.tool_call_id)
        case AssistantMessage():
            calls = tuple(ToolCall(c.id, c.function.name, c.function.arguments_json) for c in message.tool_calls or ())
            content = content or message.refusal or ""
            return Message("assistant", content, prefix=bool(message.prefix), name=message.name, tool_calls=calls)
    return Message("system", content, name=message.name)


def _as_prefix(message: Message) -> Message:
    if message.role != "assistant":
        raise RequestError(
            "'continue_final_message' needs a last message of the assistant.",
            remedy="Add one, or remove 'continue_final_message'.",
            param="continue_final_message",
        )
    return replace(message, prefix=True)
