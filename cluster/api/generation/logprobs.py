"""Formats log-probabilities for responses: parallel lists for completions, a list of tokens for chat, vLLM's dictionaries for prompts.

Knows the tokenizer and the formats; knows no requests.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.api.schemas.base import PromptLogprob, PromptLogprobs
from cluster.api.schemas.chat import ChatLogprobs, ChatTokenLogprob, TopLogprob
from cluster.api.schemas.completions import CompletionLogprobs
from cluster.text.output.detokenizer import Detokenizer
from cluster.text.output.output_text import PlacedLogprob
from cluster.text.tokenizer import Tokenizer
from workers.protocol import TokenLogprob

LOWEST_LOGPROB = -9999.0  # instead of minus infinity, which JSON cannot represent


@dataclass(frozen=True, slots=True)
class EchoedPrompt:
    """A prompt as text. `offsets`: where each token's text begins, in characters."""

    token_ids: list[int]
    text: str
    offsets: list[int]


def echo_prompt(tokenizer: Tokenizer, token_ids: list[int], *, shows_special: bool = False) -> EchoedPrompt:
    """The text before an output that `continues` these ids."""
    detokenizer = Detokenizer(tokenizer.shown_pieces(shows_special=shows_special))
    placed = [detokenizer.push_token(token_id) for token_id in token_ids]
    return EchoedPrompt(token_ids, "".join([text for _, text in placed]), [offset for offset, _ in placed])


def render_completion(
    tokenizer: Tokenizer,
    placed: Sequence[PlacedLogprob],
    *,
    num_top: int,
    echoed: EchoedPrompt | None = None,
    echoed_logprobs: Sequence[TokenLogprob | None] = (),
    start: int = 0,
) -> CompletionLogprobs:
    """OpenAI's parallel lists. The chosen token is always in `top_logprobs`, even if that makes it longer than requested.

    echoed: comes before the output's tokens, whose offsets count from `start`.
    """
    tokens, logprobs, tops, offsets = [], [], [], []
    if echoed is not None:
        for token_id, offset, entry in zip(echoed.token_ids, echoed.offsets, echoed_logprobs, strict=True):
            tokens.append(tokenizer.token_text(token_id))
            logprobs.append(None if entry is None else _finite(entry.logprob))
            tops.append(None if entry is None else _top(tokenizer, entry, num_top))
            offsets.append(offset)
    for p in placed:
        tokens.append(tokenizer.token_text(p.logprob.token_id))
        logprobs.append(_finite(p.logprob.logprob))
        tops.append(_top(tokenizer, p.logprob, num_top))
        offsets.append(p.text_offset + start)
    return CompletionLogprobs(tokens=tokens, token_logprobs=logprobs, top_logprobs=tops, text_offset=offsets)


def render_chat(tokenizer: Tokenizer, placed: Sequence[PlacedLogprob], *, shows_special: bool = False) -> ChatLogprobs:
    """OpenAI's list of tokens, each with its alternatives. shows_special: special tokens are text, and so have bytes."""

    def bytes_of(token_id: int) -> list[int] | None:
        return tokenizer.token_bytes(token_id, shows_special=shows_special)

    def top(token_id: int, logprob: float) -> TopLogprob:
        return TopLogprob(token=tokenizer.token_text(token_id), logprob=_finite(logprob), bytes=bytes_of(token_id))

    return ChatLogprobs(
        content=[
            ChatTokenLogprob(
                token=tokenizer.token_text(p.logprob.token_id),
                logprob=_finite(p.logprob.logprob),
                bytes=bytes_of(p.logprob.token_id),
                top_logprobs=[top(*t) for t in p.logprob.top],
            )
            for p in placed
        ]
    )


def render_prompt(tokenizer: Tokenizer, entries: Sequence[TokenLogprob | None], *, num_top: int) -> PromptLogprobs:
    """vLLM's `prompt_logprobs`: by token id, the prompt's own token and the `num_top` likeliest tokens."""

    def one(token_id: int, logprob: float, rank: int) -> PromptLogprob:
        return PromptLogprob(logprob=_finite(logprob), rank=rank, decoded_token=tokenizer.token_text(token_id))

    return [
        None
        if entry is None
        else {
            str(entry.token_id): one(entry.token_id, entry.logprob, entry.rank),
            **{str(i): one(i, logprob, rank) for rank, (i, logprob) in enumerate(entry.top[:num_top], 1)},
        }
        for entry in entries
    ]


def _top(tokenizer: Tokenizer, entry: TokenLogprob, num_top: int) -> dict[str, float]:
    top: dict[str, float] = {}
    for token_id, logprob in [*entry.top[:num_top], (entry.token_id, entry.logprob)]:
        # Two tokens may have the same text: keep the likelier one, which comes first.
        top.setdefault(tokenizer.token_text(token_id), _finite(logprob))
    return top


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)
