"""mistral-common's encoders of every version, with the assistant's turns that they refuse.

Knows mistral-common's encoders only. Two kinds of turns are added: an empty one, which is nothing but the end token, and, up to v3, one
with text and tool calls, which are written in the order of version 7: the text, then the calls.
"""

from collections.abc import Callable, Mapping
from typing import Any

from mistral_common.protocol.instruct.messages import AssistantMessage
from mistral_common.tokens.tokenizers.instruct import (
    InstructTokenizerV1,
    InstructTokenizerV2,
    InstructTokenizerV3,
    InstructTokenizerV7,
    InstructTokenizerV11,
    InstructTokenizerV13,
    InstructTokenizerV15,
)

Encode = Callable[[AssistantMessage, bool], list[int]]


def _with_turns(encoder: Any) -> Any:
    """A subclass of one of mistral-common's encoders."""

    class Turns(encoder):  # type: ignore[misc]
        def encode_assistant_message(self, message: AssistantMessage, is_before_last_user_message: bool) -> list[int]:
            encode, eos_token_id = super().encode_assistant_message, self.tokenizer.eos_id
            return _encode(encode, message, is_before_last_user_message, eos_token_id)

    Turns.__name__ = f"Turns{encoder.__name__}"
    return Turns


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


ENCODERS: Mapping[str, Any] = {
    "v1": _with_turns(InstructTokenizerV1),
    "v2": _with_turns(InstructTokenizerV2),
    "v3": _with_turns(InstructTokenizerV3),
    "v7": _with_turns(InstructTokenizerV7),
    "v11": _with_turns(InstructTokenizerV11),
    "v13": _with_turns(InstructTokenizerV13),
    "v15": _with_turns(InstructTokenizerV15),
}
