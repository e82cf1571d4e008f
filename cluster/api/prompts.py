"""Prompts to token ids: the forms of `prompt` and `input`, truncation, and the refusal of what can never fit.

Knows the tokenizer and the model's context length. Knows no endpoint; conversations are cluster/text/chat.py's.
"""

import asyncio
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

from cluster.api import sampling
from cluster.text.tokenizer import Tokenizer
from workers.errors import RequestError
from workers.protocol import EngineFacts

LONG_TEXT_CHARS = 4096  # about a millisecond of encoding; longer texts are encoded in a thread

T = TypeVar("T")


def split_prompt(prompt: str | Sequence[str | int | list[int]], *, param: str = "prompt") -> list[str | list[int]]:
    """The prompts that a body's `prompt` or `input` holds. Raises RequestError for an empty or a mixed list."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt or any(isinstance(p, list) and not p for p in prompt):
        raise RequestError(f"{param!r} holds an empty list; send at least one text or token id.", param=param)
    token_ids = [p for p in prompt if isinstance(p, int)]
    prompts = [p for p in prompt if not isinstance(p, int)]
    if token_ids and not prompts:
        return [token_ids]
    if token_ids or len({type(p) for p in prompts}) > 1:
        raise RequestError(f"{param!r} mixes texts and token ids; use one of them.", param=param)
    return prompts


async def encode_prompt(
    tokenizer: Tokenizer,
    prompt: str | list[int],
    *,
    facts: EngineFacts,
    truncates: bool = False,
    param: str = "prompt",
) -> list[int]:
    """Token ids of one prompt, text with the beginning-of-sequence token before it. Raises RequestError.

    truncates: `truncate` follows, so that no length is hopeless.
    """
    if isinstance(prompt, list):
        sampling.check_token_ids(prompt, param=param, vocab_size=facts.vocab_size)
        return prompt
    if not truncates:
        refuse_hopeless(len(prompt), tokenizer, param=param, facts=facts)
    return await in_thread_if_long(len(prompt), lambda: tokenizer.encode(prompt))


async def in_thread_if_long(num_chars: int, encode: Callable[[], T]) -> T:
    """What `encode` returns, computed beside the event loop when the text is long."""
    return await asyncio.to_thread(encode) if num_chars > LONG_TEXT_CHARS else encode()


def refuse_hopeless(num_chars: int, tokenizer: Tokenizer, *, param: str, facts: EngineFacts) -> None:
    """Raises RequestError for a text too long whatever its tokens are, before time is spent on encoding it."""
    least = math.ceil(num_chars / tokenizer.max_piece_chars)
    if least >= facts.max_model_len:
        raise sampling.too_long(least, param=param, max_model_len=facts.max_model_len, at_least=True)


def truncate(token_ids: list[int], keep: int | None, *, facts: EngineFacts, num_output: int | None) -> list[int]:
    """The last `keep` tokens, a beginning-of-sequence token that stood before them kept as the first of these.

    keep None: all of them; -1: as many as leave room for `num_output` (None: one) in the context. Raises RequestError for 0.
    """
    if keep is None:
        return token_ids
    if keep == 0:
        raise RequestError(
            "'truncate_prompt_tokens' is 0, which leaves no prompt; send at least 1, or -1 for what fits.",
            param="truncate_prompt_tokens",
        )
    if keep == -1:
        keep = max(1, facts.max_model_len - (1 if num_output is None else max(num_output, 1)))
    if len(token_ids) <= keep:
        return token_ids
    if token_ids[0] == facts.bos_token_id and keep > 1:
        return [token_ids[0], *token_ids[len(token_ids) - keep + 1 :]]
    return token_ids[-keep:]
