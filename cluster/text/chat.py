"""Conversations to token ids, through mistral-common's own templates v1, v2 and v3: the reference, not a copy of it.

Knows roles and which conversations a template allows. Does not know HTTP, nor how the answer's ids become text again: the answer
is decoded on its own, except behind a prefix, whose ids `encode` returns for the detokenizer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mistral_common.exceptions import MistralCommonException
from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, UserMessage
from mistral_common.protocol.instruct.normalize import get_normalizer
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.validator import ValidationMode, get_validator
from mistral_common.tokens.tokenizers.base import TokenizerVersion
from mistral_common.tokens.tokenizers.instruct import InstructTokenizerV1, InstructTokenizerV2, InstructTokenizerV3
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer

from cluster.text.tokenizer import TemplateVersion, Tokenizer
from workers.errors import ConfigError, RequestError

Role = Literal["system", "user", "assistant"]
_TEMPLATES: dict[TemplateVersion, Any] = {
    "v1": InstructTokenizerV1,
    "v2": InstructTokenizerV2,
    "v3": InstructTokenizerV3,
}


@dataclass(frozen=True, slots=True)
class Message:
    """`prefix` marks a last assistant message that the answer shall continue."""

    role: Role
    content: str
    prefix: bool = False


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """`continues` are the ids at the prompt's end whose text the answer goes on with: a prefix, else none."""

    token_ids: list[int]
    continues: list[int]


class ChatTemplate:
    """One template version over one tokenizer. Raises ConfigError when the tokenizer lacks the template's control tokens."""

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
        self._mistral: Any = MistralTokenizer(
            _TEMPLATES[self.version](base),
            validator=get_validator(version, mode=ValidationMode.test),
            request_normalizer=get_normalizer(version, None),
        )

    def encode(self, messages: Sequence[Message]) -> ChatPrompt:
        """The conversation's ids, from the beginning-of-sequence token on. Raises RequestError for what no template allows."""
        if not any(m.role == "user" for m in messages):
            raise RequestError("The conversation has no user message; add one.", param="messages")
        for i, message in enumerate(messages):
            if message.role == "assistant" and not message.content:
                raise RequestError(f"messages[{i}]: an assistant message needs content.", param="messages")
        if messages[-1].role == "assistant" and not messages[-1].prefix:
            raise RequestError(
                "The last message is the assistant's; end with a user message, or set its 'prefix' to true to have it continued.",
                param="messages",
            )
        try:
            encoded = self._mistral.encode_chat_completion(
                ChatCompletionRequest(messages=[_convert(m) for m in messages])
            )
        except MistralCommonException as e:
            sentence = str(e).rstrip(".")
            raise RequestError(
                f"The conversation does not fit chat template {self.version}: {sentence}.", param="messages"
            ) from e
        except (RuntimeError, UnicodeError) as e:  # a lone surrogate: no UTF-8 exists for it
            raise RequestError(
                "A message is not valid Unicode: it holds half of a surrogate pair.", param="messages"
            ) from e
        return ChatPrompt(list(encoded.tokens), list(encoded.prefix_ids or []))


def _convert(message: Message) -> UserMessage | AssistantMessage | SystemMessage:
    if message.role == "user":
        return UserMessage(content=message.content)
    if message.role == "system":
        return SystemMessage(content=message.content)
    return AssistantMessage(content=message.content, prefix=message.prefix)
