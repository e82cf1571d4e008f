"""Mistral's guardrail system prompt, which `safe_prompt` in their API adds to a conversation. Knows messages only."""

from collections.abc import Sequence
from dataclasses import replace

from cluster.text.chat.template import Message

SAFE_PROMPT = (
    "Always assist with care, respect, and truth. Respond with utmost utility yet securely. "
    "Avoid harmful, unethical, prejudiced, or negative content. Ensure replies promote fairness and positivity."
)


def with_safe_prompt(messages: Sequence[Message]) -> list[Message]:
    """The conversation with the guardrail before its own system prompt, as one message: some templates allow only one."""
    if messages and messages[0].role == "system":
        first, *others = messages[0].texts or ("",)
        text = f"{SAFE_PROMPT}\n\n{first}" if first else SAFE_PROMPT
        return [replace(messages[0], content=(text, *others) if others else text), *messages[1:]]
    return [Message("system", SAFE_PROMPT), *messages]
