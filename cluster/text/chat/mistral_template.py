"""The chat templates of mistral-common, for the Mistral family.

Knows mistral-common, which checks and encodes the conversation; mistral_turns.py adds turns that it refuses. The answer is decoded on its
own, except after a prefix, whose ids `encode` returns for the detokenizer.

    version   vocabulary               conversations
    v1        SentencePiece, 32,000    [INST] is text; a system message stands in the first turn of the user
    v2, v3    SentencePiece or tekken  control tokens, tools; a system message stands in the last turn of the user
    v7        either                   a system message has its own control tokens
    v11       tekken                   tool calls by name, see tools/named_calls.py
    v13       tekken                   tools stand in the first turn of the user
    v15       tekken                   settings of the model, such as its effort in reasoning
"""

from collections.abc import Sequence
from typing import Any

from mistral_common.exceptions import InvalidToolException, InvalidToolSchemaException, MistralCommonException
from mistral_common.protocol.instruct import tool_calls as mistral
from mistral_common.protocol.instruct.chunk import TextChunk
from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, ToolMessage, UserMessage
from mistral_common.protocol.instruct.normalize import get_normalizer
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.validator import ValidationMode, get_validator
from mistral_common.tokens.tokenizers.base import TokenizerVersion

from cluster.text.chat.mistral_turns import ENCODERS
from cluster.text.chat.mistral_vocabulary import MistralVocabulary
from cluster.text.chat.published import own_version
from cluster.text.chat.template import (
    DEFAULT_OPTIONS,
    ChatPrompt,
    Message,
    TemplateOptions,
    check_conversation,
    check_tools,
    invalid_unicode,
)
from cluster.text.tokenizer import Tokenizer
from cluster.text.tools.calls import CallFormat
from cluster.text.tools.definitions import ToolDefinition, mistral_id
from cluster.text.tools.named_calls import ARGS, CALL_ID
from workers.errors import ConfigError, RequestError
from workers.tokenizer_files.tekken_model import TekkenModel

_TURN_TOKENS = ("[INST]", "[/INST]")
_TOOL_TOKENS = ("[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]")
_SYSTEM_TOKENS = ("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]")
_CALL_TOKENS = (ARGS, CALL_ID)
_SETTINGS_TOKENS = ("[MODEL_SETTINGS]", "[/MODEL_SETTINGS]")
# What mistral-common's encoders cannot do without, from which version on.
_NEEDED = ((2, _TURN_TOKENS), (7, _SYSTEM_TOKENS), (11, _CALL_TOKENS), (15, _SETTINGS_TOKENS))
_FIRST_WITH_CALLS_BY_NAME = 11


class MistralTemplate:
    """One of mistral-common's templates.

    Raises ConfigError for a tokenizer that mistral-common does not read, or that lacks the template's control tokens.
    """

    supports_prefix = True
    source = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        base, self.version = _open(tokenizer)
        version = TokenizerVersion(self.version)
        needed = [name for first, names in _NEEDED if version.version_num >= first for name in names]
        missing = [name for name in needed if not base.is_special(name)]
        if missing:
            raise ConfigError(
                f"Chat template {self.version} needs the control tokens {' and '.join(missing)}, which {tokenizer.path.name} lacks.",
                remedy="Use --chat-template v1." if version.version_num <= 3 else "Use --chat-template auto.",
                param="--chat-template",
            )
        self.supports_tools = self.version != "v1" and all(base.is_special(name) for name in _TOOL_TOKENS)
        self.call_format: CallFormat = "names" if version.version_num >= _FIRST_WITH_CALLS_BY_NAME else "list"
        # "agnostic": the conversation may end with any message.
        self._validator: Any = get_validator(version, mode=ValidationMode.agnostic)
        builder = base.model_settings_builder
        if builder is not None and not version.supports_model_settings:
            raise ConfigError(
                f"Chat template {self.version} has no settings, which {tokenizer.path.name} requires.",
                remedy="Use --chat-template auto.",
                param="--chat-template",
            )
        self._normalizer: Any = get_normalizer(version, builder)
        self._encoder: Any = ENCODERS[self.version](base)
        try:
            self.encode([Message("user", "a")])
        except RequestError as e:
            raise ConfigError(
                f"Chat template {self.version} with {tokenizer.path.name} fails on a plain question: {e.message}",
                remedy="Choose another template with --chat-template.",
                param="--chat-template",
            ) from e

    def reads(self, name: str) -> bool:
        return False

    def encode(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[ToolDefinition] = (),
        options: TemplateOptions = DEFAULT_OPTIONS,
    ) -> ChatPrompt:
        check_conversation(messages)
        check_tools(messages, tools, supported=self.supports_tools)
        names = {call.id: call.name for message in messages for call in message.tool_calls}
        try:
            written = [turn for message in messages for turn in _convert(message, names)]
            definitions = [_convert_tool(tool) for tool in tools] or None
            # mistral-common would refuse an empty turn.
            checked = [turn for turn in written if not _is_empty_turn(turn)] or [UserMessage(content="")]
            self._validator.validate_request(ChatCompletionRequest(messages=checked, tools=definitions))
            request = ChatCompletionRequest(messages=written, tools=definitions)
            encoded = self._encoder.encode_instruct(self._normalizer.from_chat_completion_request(request))
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
        except RequestError as e:  # of our tokenizer
            raise RequestError(e.message, remedy=e.remedy, param="messages") from e
        except (RuntimeError, UnicodeError) as e:  # a lone surrogate, which has no UTF-8 form
            raise invalid_unicode() from e
        except ValueError as e:  # from json: a number with more digits than Python reads
            raise RequestError("The JSON of a tool, call or result cannot be parsed.", param="messages") from e
        return ChatPrompt(list(encoded.tokens), list(encoded.prefix_ids or []))


def _open(tokenizer: Tokenizer) -> tuple[Any, str]:
    """The tokenizer as mistral-common's encoders need it, and the template's version."""
    version = tokenizer.template_version or own_version(tokenizer)
    if version is None:
        raise ConfigError(
            f"The tokenizer {tokenizer.path.name} is not one of Mistral's, so it names no version of a template.",
            remedy="Use --chat-template auto, a version, or the path of a template.",
            param="--chat-template",
        )
    if isinstance(tokenizer.model, TekkenModel):
        return tokenizer.model.tekkenizer, version
    number = TokenizerVersion(version)
    if number >= TokenizerVersion.v13:
        raise ConfigError(
            f"Chat template {version} needs a tekken.json, but the tokenizer is {tokenizer.path.name}.",
            remedy="Use --chat-template auto.",
            param="--chat-template",
        )
    bos, eos = tokenizer.control_token_id("<s>"), tokenizer.control_token_id("</s>")
    if bos is None or eos is None:
        raise ConfigError(
            f"Mistral's templates need the control tokens <s> and </s>, which {tokenizer.path.name} lacks.",
            remedy="Use --chat-template auto, or the path of a template.",
            param="--chat-template",
        )
    return MistralVocabulary(tokenizer, number, bos=bos, eos=eos), version


def _convert(message: Message, names: dict[str, str]) -> list[Any]:
    """Text and tool calls become two messages, which mistral-common joins again: it refuses both in one.

    names: of the functions, by tool call id; template v2 writes them before results.
    """
    content: Any = message.content if isinstance(message.content, str) else [TextChunk(text=t) for t in message.texts]
    if message.role == "user":
        return [UserMessage(content=content)]
    if message.role == "system":
        return [SystemMessage(content=content)]
    if message.role == "tool":
        call_id = message.tool_call_id or ""
        return [ToolMessage(content=content, tool_call_id=mistral_id(call_id), name=names.get(call_id))]
    turns: list[Any] = []
    if message.texts or not message.tool_calls:
        turns.append(AssistantMessage(content=content, prefix=message.prefix))
    if message.tool_calls:
        calls = [
            mistral.ToolCall(
                id=mistral_id(call.id), function=mistral.FunctionCall(name=call.name, arguments=call.arguments)
            )
            for call in message.tool_calls
        ]
        turns.append(AssistantMessage(content=None, tool_calls=calls))
    return turns


def _is_empty_turn(turn: Any) -> bool:
    return isinstance(turn, AssistantMessage) and not turn.content and not turn.tool_calls


def _convert_tool(tool: ToolDefinition) -> mistral.Tool:
    function = mistral.Function(name=tool.name, description=tool.description, parameters=tool.parameters)
    return mistral.Tool(function=function)
