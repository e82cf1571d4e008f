"""Prompts to token ids: the forms of `prompt` and `input`, truncation, and the refusal of what can never fit.

Knows the tokenizer and the model's context length. Knows no endpoint; conversations are cluster/text/chat/template.py's.
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
    """The prompts that a body's `prompt` or `input` holds. Raises RequestError for an empty or a mixed list."""
    if isinstance(prompt, str):
        return [prompt]
    kinds = set(
        map(type, prompt)
    )  # a body may hold millions: no loop of ours over them before their number is known to be small
    if len(kinds) > 1:
        raise RequestError(f"{param!r} mixes texts and token ids; use one of them.", param=param)
    if not prompt or (kinds == {list} and not all(prompt)):
        raise RequestError(f"{param!r} holds an empty list; send at least one text or token id.", param=param)
    if kinds == {int}:
        return [cast(list[int], prompt)]
    return cast(list[str | list[int]], prompt)


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
    elif len(prompt) > MAX_TRUNCATED_CHARS:
        raise RequestError(
            f"{param!r} has {len(prompt)} characters; of a text that shall be truncated send at most {MAX_TRUNCATED_CHARS}.",
            param=param,
        )
    return await in_thread_if_long(len(prompt), lambda: tokenizer.encode(prompt))


async def in_thread_if_long(num_chars: int, encode: Callable[[], T]) -> T:
    """What `encode` returns, computed beside the event loop when the text is long."""
    if num_chars > LONG_TEXT_CHARS:
        return await asyncio.to_thread(encode)
    await asyncio.sleep(0)  # a body may hold thousands of short texts: others have a turn between them
    return encode()


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
