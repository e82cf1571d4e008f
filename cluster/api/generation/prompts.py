"""Encodes prompts to token ids: the forms of `prompt` and `input`, truncation, and length checks.

Knows the tokenizer and the model's context length. Knows no endpoint; conversations are in conversation.py.
"""

import asyncio
import math
from collections.abc import Callable, Sequence
from typing import TypeVar, cast

from cluster.api.generation import sampling
from cluster.text.tokenizer import Tokenizer
from workers.errors import RequestError
from workers.protocol import EngineFacts

MAX_TRUNCATED_CHARS = 1_000_000
LONG_TEXT_CHARS = 4096  # about a millisecond of encoding; longer texts are encoded in a thread

T = TypeVar("T")


def split_prompt(prompt: str | Sequence[str | int | list[int]], *, param: str = "prompt") -> list[str | list[int]]:
    """The prompts in a body's `prompt` or `input`. Raises RequestError for an empty or a mixed list."""
    if isinstance(prompt, str):
        return [prompt]
    # The list may have millions of items, and their number is checked later: use C loops only.
    kinds = set(map(type, prompt))
    if len(kinds) > 1:
        raise RequestError(f"{param!r} mixes texts and token ids.", remedy="Send only one kind.", param=param)
    if not prompt or (kinds == {list} and not all(prompt)):
        raise RequestError(
            f"{param!r} contains an empty list.", remedy="Send at least one text or token id.", param=param
        )
    if kinds == {int}:
        return [cast(list[int], prompt)]
    return cast(list[str | list[int]], prompt)


async def encode_prompt(
    tokenizer: Tokenizer,
    prompt: str | list[int],
    *,
    facts: EngineFacts,
    truncates: bool = False,
    add_special_tokens: bool = True,
    param: str = "prompt",
) -> list[int]:
    """Token ids of one prompt; a text may name special tokens. Raises RequestError.

    truncates: `truncate` follows, so any length fits. add_special_tokens: see Tokenizer.encode_prompt.
    """
    if isinstance(prompt, list):
        sampling.check_token_ids(prompt, param=param, vocab_size=facts.vocab_size)
        return prompt
    if not truncates:
        check_text_length(len(prompt), tokenizer, param=param, facts=facts)
    elif len(prompt) > MAX_TRUNCATED_CHARS:
        raise RequestError(
            f"{param!r} has {len(prompt)} characters; the limit for a text to truncate is {MAX_TRUNCATED_CHARS}.",
            remedy="Shorten it.",
            param=param,
        )
    return await in_thread_if_long(
        len(prompt), lambda: tokenizer.encode_prompt(prompt, add_special_tokens=add_special_tokens)
    )


async def in_thread_if_long(num_chars: int, encode: Callable[[], T]) -> T:
    """Returns what `encode` returns. Runs it in a thread if the text is long, so that the event loop stays free."""
    if num_chars > LONG_TEXT_CHARS:
        return await asyncio.to_thread(encode)
    await asyncio.sleep(0)  # a body may have thousands of short texts: let other tasks run in between
    return encode()


def check_text_length(num_chars: int, tokenizer: Tokenizer, *, param: str, facts: EngineFacts) -> None:
    """Raises RequestError for a text that is too long however it is encoded, before spending time on encoding it."""
    least = math.ceil(num_chars / tokenizer.max_piece_chars)
    if least >= facts.max_model_len:
        raise sampling.too_long(least, param=param, max_model_len=facts.max_model_len, at_least=True)


def truncate(token_ids: list[int], keep: int | None, *, facts: EngineFacts, num_output: int | None) -> list[int]:
    """The last `keep` tokens. A beginning-of-sequence token stays the first of them.

    keep None: all tokens; -1: as many as leave room for `num_output` (None: one) in the context. Raises RequestError for 0.
    """
    if keep is None:
        return token_ids
    if keep == 0:
        raise RequestError(
            "'truncate_prompt_tokens' is 0, which leaves no prompt.",
            remedy="Send at least 1, or -1 to keep as much as fits.",
            param="truncate_prompt_tokens",
        )
    if keep == -1:
        keep = max(1, facts.max_model_len - (1 if num_output is None else max(num_output, 1)))
    if len(token_ids) <= keep:
        return token_ids
    if token_ids[0] == facts.bos_token_id and keep > 1:
        return [token_ids[0], *token_ids[len(token_ids) - keep + 1 :]]
    return token_ids[-keep:]
