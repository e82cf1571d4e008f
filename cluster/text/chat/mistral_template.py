"""The chat templates v1, v2 and v3 of mistral-common, for the Mistral family.

Knows mistral-common, which checks and encodes the conversation. The answer is decoded on its own, except after a prefix, whose ids
`encode` returns for the detokenizer.
"""

from collections.abc import Sequence
from typing import Any

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

from cluster.text.chat.template import ChatPrompt, Message, check_conversation, invalid_unicode
from cluster.text.tokenizer import TemplateVersion, Tokenizer
from cluster.text.tools.definitions import ToolDefinition, mistral_id
from workers.errors import ConfigError, RequestError

_TEMPLATES: dict[TemplateVersion, Any] = {
    "v1": InstructTokenizerV1,
    "v2": InstructTokenizerV2,
    "v3": InstructTokenizerV3,
}
_TOOL_TOKENS = ("[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]")


class MistralTemplate:
    """One of mistral-common's templates. Raises ConfigError if the tokenizer lacks the template's control tokens."""

    supports_prefix = True

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.version: TemplateVersion = tokenizer.template_version
        # mistral-common reads the version from the file name; passing it lets a plain tokenizer.model use any template.
        version = TokenizerVersion(self.version)
        base = SentencePieceTokenizer(tokenizer.path, tokenizer_version=version)
        if self.version != "v1" and not (base.is_special("[INST]") and base.is_special("[/INST]")):
            raise ConfigError(
                f"Chat template {self.version} needs the control tokens [INST] and [/INST], which {tokenizer.path.name} lacks.",
                remedy="Use --chat-template v1.",
                param="--chat-template",
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
                "This model's chat template does not support tools.",
                remedy="Remove 'tools' and tool calls from the request.",
                param="tools",
            )
        for i, message in enumerate(messages):
            if message.tool_calls and message.content.strip():
                raise RequestError(
                    f"messages[{i}]: chat template {self.version} does not allow both content and tool calls in a message.",
                    remedy="Send one of them.",
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
            reason = str(e).split("\n", 1)[0].rstrip(".")
            raise RequestError(
                f"{what} does not fit chat template {self.version}: {reason}.",
                param="tools" if is_tool else "messages",
            ) from e
        except RecursionError as e:
            raise RequestError(
                "The JSON of a tool, call or result is nested too deeply.", remedy="Make it flatter.", param="messages"
            ) from e
        except (RuntimeError, UnicodeError) as e:  # a lone surrogate, which has no UTF-8 form
            raise invalid_unicode() from e
        except ValueError as e:  # from json: a number with more digits than Python reads
            raise RequestError("The JSON of a tool, call or result cannot be parsed.", param="messages") from e
        return ChatPrompt(list(encoded.tokens), list(encoded.prefix_ids or []))


def _convert(message: Message, names: dict[str, str]) -> UserMessage | AssistantMessage | SystemMessage | ToolMessage:
    """names: of the functions, by tool call id; template v2 writes them before results."""
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
