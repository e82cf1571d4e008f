"""mistral-common's encoders v1 to v3, with the assistant's turns that they refuse.

Knows mistral-common's encoders only. Two kinds of turns are added: an empty one, which is nothing but the end token, and one with text
and tool calls, which are written in the order of version 7: the text, then the calls.
"""

from collections.abc import Callable
from typing import Any

from mistral_common.protocol.instruct.messages import AssistantMessage
from mistral_common.tokens.tokenizers.instruct import InstructTokenizerV1, InstructTokenizerV2, InstructTokenizerV3

Encode = Callable[[AssistantMessage, bool], list[int]]


class TurnsV1(InstructTokenizerV1):
    def encode_assistant_message(self, message: AssistantMessage, is_before_last_user_message: bool) -> list[int]:
        return _encode(super().encode_assistant_message, message, is_before_last_user_message, self.tokenizer.eos_id)


class TurnsV2(InstructTokenizerV2):
    def encode_assistant_message(self, message: AssistantMessage, is_before_last_user_message: bool) -> list[int]:
        return _encode(super().encode_assistant_message, message, is_before_last_user_message, self.tokenizer.eos_id)


class TurnsV3(InstructTokenizerV3):
    def encode_assistant_message(self, message: AssistantMessage, is_before_last_user_message: bool) -> list[int]:
        return _encode(super().encode_assistant_message, message, is_before_last_user_message, self.tokenizer.eos_id)


def _encode(encode: Encode, message: AssistantMessage, before_last_user: bool, eos_token_id: Any) -> list[int]:
    end = [] if message.prefix else [int(eos_token_id)]
    if message.content and message.tool_calls:
        # A prefix is written without the end token. Calls of earlier turns may be left out, together with theirs.
        text = encode(AssistantMessage(content=message.content, prefix=True), before_last_user)
        calls = encode(AssistantMessage(content=None, tool_calls=message.tool_calls), before_last_user)
        return [*text, *(calls or end)]
    if message.content or message.tool_calls:
        return encode(message, before_last_user)
    return end
