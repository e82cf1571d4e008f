"""Conversations to token ids: the seam behind which chat templates stand, and mistral-common's own templates v1, v2 and v3.

Knows roles, tools and which conversations a template allows. Does not know HTTP, nor how the answer's ids become text again: the
answer is decoded on its own, except behind a prefix, whose ids `encode` returns for the detokenizer. Other families' templates are
jinja_template.py's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from mistral_common.exceptions import InvalidToolException, InvalidToolSchemaException, MistralCommonException
from mistral_common.protocol.instruct import tool_calls as mistral
from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, ToolMessage, UserMessage
from mistral_common.protocol.instruct.normalize import get_normalizer
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.validator import ValidationMode, get_validator
from mistral_common.tokens.tokenizers.base import TokenizerVersion
from mistral_common.tokens.tokenizers.instruct import InstructTokenizerV1, InstructTokenizerV2, InstructTokenizerV3
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer

from cluster.text.tokenizer import TemplateVersion, Tokenizer
from cluster.text.tools.definitions import ToolCall, ToolDefinition, mistral_id
from workers.errors import ConfigError, RequestError

Role = Literal["system", "user", "assistant", "tool"]
_TEMPLATES: dict[TemplateVersion, Any] = {
    "v1": InstructTokenizerV1,
    "v2": InstructTokenizerV2,
    "v3": InstructTokenizerV3,
}
_TOOL_TOKENS = ("[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]")


@dataclass(frozen=True, slots=True)
class Message:
    """`prefix` marks a last assistant message that the answer shall continue. Only assistants have `tool_calls`; a tool's message
    has the `tool_call_id` it answers, and may repeat the tool's `name`."""

    role: Role
    content: str = ""
    prefix: bool = False
    name: str | None = None
    tool_calls: Sequence[ToolCall] = ()
    tool_call_id: str | None = None


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """`continues` are the ids at the prompt's end whose text the answer goes on with: a prefix, else none."""

    token_ids: list[int]
    continues: list[int]


class ChatTemplate(Protocol):
    """One way to write conversations for one tokenizer. `encode` may run in a thread."""

    @property
    def supports_tools(self) -> bool: ...

    @property
    def supports_prefix(self) -> bool: ...

    def encode(self, messages: Sequence[Message], *, tools: Sequence[ToolDefinition] = ()) -> ChatPrompt:
        """The conversation's ids, from the beginning-of-sequence token on. Raises RequestError for what the template does not allow."""
        ...


class MistralTemplate:
    """One of mistral-common's templates. Raises ConfigError when the tokenizer lacks the template's control tokens."""

    supports_prefix = True

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.version: TemplateVersion = tokenizer.template_version
        # mistral-common reads the version off the file's name; naming it here lets a plain tokenizer.model use any template.
        version = TokenizerVersion(self.version)
        base = SentencePieceTokenizer(tokenizer.path, tokenizer_version=version)
        if self.version != "v1" and not (base.is_special("[INST]") and base.is_special("[/INST]")):
            raise ConfigError(
                f"Chat template {self.version} needs the control tokens [INST] and [/INST], which "
                f"{tokenizer.path.name} does not have; use --chat-template v1."
            )
        self.supports_tools = self.version != "v1" and all(base.is_special(name) for name in _TOOL_TOKENS)
        self._mistral: Any = MistralTokenizer(
            _TEMPLATES[self.version](base),
            validator=get_validator(version, mode=ValidationMode.test),
            request_normalizer=get_normalizer(version, None),
        )

    def encode(self, messages: Sequence[Message], *, tools: Sequence[ToolDefinition] = ()) -> ChatPrompt:
        check_conversation(messages)
        if not self.supports_tools and (tools or any(m.tool_calls for m in messages)):
            raise RequestError(
                "This model's chat template has no tools; leave 'tools' and tool calls out.", param="tools"
            )
        for i, message in enumerate(messages):
            if message.tool_calls and message.content.strip():
                raise RequestError(
                    f"messages[{i}]: an assistant message has either content or tool calls in chat template {self.version}; "
                    "send one of them.",
                    param="messages",
                )
        names = {call.id: call.name for message in messages for call in message.tool_calls}
        try:
            encoded = self._mistral.encode_chat_completion(
                ChatCompletionRequest(
                    messages=[_convert(m, names) for m in messages],
                    tools=[_convert_tool(tool) for tool in tools] or None,
                )
            )
        except MistralCommonException as e:
            is_tool = isinstance(e, InvalidToolException | InvalidToolSchemaException)
            what = "A tool" if is_tool else "The conversation"
            sentence = str(e).split("\n", 1)[0].rstrip(".")
            raise RequestError(
                f"{what} does not fit chat template {self.version}: {sentence}.",
                param="tools" if is_tool else "messages",
            ) from e
        except RecursionError as e:
            raise RequestError("The JSON of a tool, call or result is nested too deeply.", param="messages") from e
        except (RuntimeError, UnicodeError) as e:  # a lone surrogate: no UTF-8 exists for it
            raise _half_a_surrogate() from e
        except ValueError as e:  # json's: a number of more digits than Python reads
            raise RequestError("The JSON of a tool, call or result cannot be read.", param="messages") from e
        return ChatPrompt(list(encoded.tokens), list(encoded.prefix_ids or []))


def check_conversation(messages: Sequence[Message]) -> None:
    """What every template asks: somebody to answer, and results for calls that were made. Raises RequestError."""
    if not any(m.role == "user" for m in messages):
        raise RequestError("The conversation has no user message; add one.", param="messages")
    open_calls: dict[str, bool] = {}  # of the last assistant message that made any: whether each has its result
    for i, message in enumerate(messages):
        for text in (message.content, *(part for call in message.tool_calls for part in (call.name, call.arguments))):
            if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
                raise _half_a_surrogate()
        if message.role == "tool":
            if open_calls.get(message.tool_call_id or "") is not False:
                raise RequestError(
                    f"messages[{i}]: a tool's result needs the 'tool_call_id' of a call in the assistant message before it, "
                    "which has no result yet.",
                    param="messages",
                )
            open_calls[message.tool_call_id or ""] = True
            continue
        if not all(open_calls.values()):
            raise RequestError(
                f"messages[{i}]: a tool call before it has no result; add a message of role 'tool' for each call.",
                param="messages",
            )
        open_calls = {call.id: False for call in message.tool_calls}
        if len(open_calls) < len(message.tool_calls):
            raise RequestError(f"messages[{i}]: two tool calls have the same id.", param="messages")
        if message.role == "assistant" and not message.content and not message.tool_calls:
            raise RequestError(f"messages[{i}]: an assistant message needs content or tool calls.", param="messages")
    last = messages[-1]
    if last.role == "assistant" and not last.prefix:
        raise RequestError(
            "The last message is the assistant's; end with a user message, or set its 'prefix' to true to have it continued.",
            param="messages",
        )
    if last.prefix and last.tool_calls:
        raise RequestError("A 'prefix' to continue has content and no tool calls.", param="messages")


def _half_a_surrogate() -> RequestError:
    return RequestError("A message is not valid Unicode: it holds half of a surrogate pair.", param="messages")


def _convert(message: Message, names: dict[str, str]) -> UserMessage | AssistantMessage | SystemMessage | ToolMessage:
    """names: of the tool calls' functions, by id; v2 writes them before results."""
    if message.role == "user":
        return UserMessage(content=message.content)
    if message.role == "system":
        return SystemMessage(content=message.content)
    if message.role == "tool":
        call_id = message.tool_call_id or ""
        return ToolMessage(content=message.content, tool_call_id=mistral_id(call_id), name=names.get(call_id))
    if message.tool_calls:
        calls = [
            mistral.ToolCall(
                id=mistral_id(call.id), function=mistral.FunctionCall(name=call.name, arguments=call.arguments)
            )
            for call in message.tool_calls
        ]
        return AssistantMessage(content=None, tool_calls=calls)
    return AssistantMessage(content=message.content, prefix=message.prefix)


def _convert_tool(tool: ToolDefinition) -> mistral.Tool:
    function = mistral.Function(name=tool.name, description=tool.description, parameters=tool.parameters)
    return mistral.Tool(function=function)
