"""One request inside the engine: its tokens, how far they are computed, and the last gate that lets it in.

Knows no torch, no blocks and no scheduling policy.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from workers.errors import RequestError
from workers.protocol import BATCH_PRIORITY, FinishReason, GenerateRequest, SamplingParams

if TYPE_CHECKING:
    from workers.engine.prompt_outputs import PromptOutput
    from workers.sampling.grammar import Constraint

MAX_TOP_LOGPROBS = 100
# All of a prompt's go out in one frame: this many (token, log-probability) pairs take about 15 MB.
MAX_PROMPT_LOGPROB_PAIRS = 1_000_000
MAX_BAD_WORDS = 1000
MAX_BAD_WORDS_TOKENS = 10_000
MAX_TOP_K = 2**31 - 1
UINT64 = 1 << 64


@dataclass(eq=False, slots=True)
class Request:
    """`token_ids` is prompt and output in a row; the KV cache holds the first `num_computed_tokens` of them."""

    request_id: str
    sampling: SamplingParams
    num_prompt_tokens: int
    token_ids: list[int]
    arrival: int  # order of arrival: the tie-break between equal priorities
    priority: int = 0
    num_computed_tokens: int = 0
    num_cached_tokens: int | None = None  # prompt tokens found in the prefix cache at first admission
    block_ids: list[int] = field(default_factory=list)
    num_released_blocks: int = 0  # leading block_ids that are the null block: behind the window
    num_named_blocks: int = 0  # leading block_ids whose content the pool knows by hash
    block_hashes: list[bytes] = field(default_factory=list)  # of the leading full blocks of token_ids
    num_preemptions: int = 0
    constraint: "Constraint | None" = None  # once its grammar is compiled
    prompt_output: "PromptOutput | None" = None

    @property
    def max_prefix_tokens(self) -> int:
        """How many of its tokens may come from the prefix cache: computing yields logits and hidden states, finding does not."""
        if self.prompt_output is not None and self.prompt_output.rows:
            return self.prompt_output.rows.start
        return self.num_tokens - 1

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def order(self) -> tuple[int, int]:
        """Smaller is served first and preempted last."""
        return (self.priority, self.arrival)

    @property
    def is_background(self) -> bool:
        return self.priority >= BATCH_PRIORITY

    @property
    def num_blocks_held(self) -> int:
        return len(self.block_ids) - self.num_released_blocks

    def append(self, token_id: int) -> None:
        self.token_ids.append(token_id)
        if self.constraint is not None:
            self.constraint.accept(token_id)

    def stops(self, eos_token_ids: tuple[int, ...]) -> bool:
        """Whether the token just appended is one that ends the request and is no part of its text."""
        token, sampling = self.token_ids[-1], self.sampling
        stops = token in sampling.stop_token_ids or (token in eos_token_ids and not sampling.ignore_eos)
        return stops and self.num_output_tokens > sampling.min_tokens

    def finish_reason(self, *, eos_token_ids: tuple[int, ...], max_model_len: int) -> FinishReason | None:
        """Why the token just appended, or the prompt where no token is wanted, ends the request; or None."""
        sampling = self.sampling
        if sampling.max_tokens and self.stops(eos_token_ids):
            return FinishReason.STOP
        if self.constraint is not None and self.constraint.is_finished:
            return FinishReason.STOP
        if self.num_output_tokens >= sampling.max_tokens or self.num_tokens >= max_model_len:
            return FinishReason.LENGTH
        return None


def make_request(message: GenerateRequest, *, arrival: int, vocab_size: int, max_model_len: int) -> Request:
    """Validates a request from the wire. Raises RequestError naming the field: nothing later may fail because of it."""
    sampling = message.sampling
    _check_tokens("prompt", message.prompt_token_ids, vocab_size)
    _check_tokens("output_token_ids", message.output_token_ids, vocab_size)
    _check_tokens("stop_token_ids", sampling.stop_token_ids, vocab_size)
    _check_tokens("logit_bias", sampling.logit_bias, vocab_size)
    _check_tokens("allowed_token_ids", sampling.allowed_token_ids or (), vocab_size)
    _check_tokens("bad_words", (token_id for word in sampling.bad_words for token_id in word), vocab_size)
    _check_sampling(sampling)
    _check_lists(sampling)
    _check_prompt_outputs(message)
    if not message.prompt_token_ids:
        raise RequestError("The prompt has no tokens; send at least one.", param="prompt")
    num_tokens = len(message.prompt_token_ids) + len(message.output_token_ids)
    if num_tokens + min(sampling.max_tokens, 1) > max_model_len:
        including = " including at least one of output" if sampling.max_tokens else ""
        raise RequestError(
            f"The prompt has {num_tokens} tokens, but this model's context holds {max_model_len} tokens{including}; "
            "shorten the prompt.",
            param="prompt",
            code="context_length_exceeded",
        )
    if message.output_token_ids and len(message.output_token_ids) >= sampling.max_tokens:
        raise RequestError("output_token_ids already holds max_tokens tokens.", param="max_tokens")
    return Request(
        request_id=message.request_id,
        sampling=sampling,
        num_prompt_tokens=len(message.prompt_token_ids),
        token_ids=[*message.prompt_token_ids, *message.output_token_ids],
        arrival=arrival,
        priority=message.priority,
    )


def _check_tokens(param: str, token_ids: Iterable[int], vocab_size: int) -> None:
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            raise RequestError(
                f"{param} contains token id {token_id}; this model's ids are 0 to {vocab_size - 1}.", param=param
            )


def _check_sampling(p: SamplingParams) -> None:
    # (name, value, smallest allowed, largest allowed); infinities and NaN fail every comparison below.
    bounds = (
        ("temperature", p.temperature, 0.0, 100.0),
        ("top_p", p.top_p, 0.0, 1.0),
        ("top_k", p.top_k, 0, MAX_TOP_K),
        ("min_p", p.min_p, 0.0, 1.0),
        ("repetition_penalty", p.repetition_penalty, 0.01, 100.0),
        ("presence_penalty", p.presence_penalty, -100.0, 100.0),
        ("frequency_penalty", p.frequency_penalty, -100.0, 100.0),
        ("max_tokens", p.max_tokens, 0, math.inf),
        ("min_tokens", p.min_tokens, 0, p.max_tokens),
        ("logprobs", p.logprobs or 0, 0, MAX_TOP_LOGPROBS),
        ("prompt_logprobs", p.prompt_logprobs or 0, 0, MAX_TOP_LOGPROBS),
        ("seed", p.seed, -UINT64, UINT64),
        *(("logit_bias", bias, -100.0, 100.0) for bias in p.logit_bias.values()),
    )
    for name, value, low, high in bounds:
        if not low <= value <= high:
            raise RequestError(f"{name} is {value}; it must be between {low} and {high}.", param=name)
    if p.top_p == 0.0:
        raise RequestError("top_p is 0; it must be above 0.", param="top_p")


def _check_lists(p: SamplingParams) -> None:
    if p.allowed_token_ids is not None and not p.allowed_token_ids:
        raise RequestError(
            "allowed_token_ids is empty; name at least one token, or leave it out.", param="allowed_token_ids"
        )
    if not all(p.bad_words):
        raise RequestError("bad_words has a word without tokens; remove it.", param="bad_words")
    if len(p.bad_words) > MAX_BAD_WORDS or sum(map(len, p.bad_words)) > MAX_BAD_WORDS_TOKENS:
        raise RequestError(
            f"bad_words has too many words; at most {MAX_BAD_WORDS} with {MAX_BAD_WORDS_TOKENS} tokens together are allowed.",
            param="bad_words",
        )
    if p.grammar is None:
        return
    combined = {
        "ignore_eos": p.ignore_eos,
        "min_tokens": p.min_tokens,
        "allowed_token_ids": p.allowed_token_ids,
        "bad_words": p.bad_words,
    }
    for name, value in combined.items():
        if value:
            raise RequestError(f"{name} and structured_outputs exclude one another; leave one out.", param=name)


def _check_prompt_outputs(message: GenerateRequest) -> None:
    p, num_prompt_tokens = message.sampling, len(message.prompt_token_ids)
    if not 0 <= p.prompt_logprobs_start < max(1, num_prompt_tokens):
        raise RequestError(
            f"prompt_logprobs_start is {p.prompt_logprobs_start}; the prompt has tokens 0 to {num_prompt_tokens - 1}.",
            param="prompt_logprobs_start",
        )
    num_wanted = num_prompt_tokens - p.prompt_logprobs_start
    if p.prompt_logprobs is not None and num_wanted * (1 + p.prompt_logprobs) > MAX_PROMPT_LOGPROB_PAIRS:
        raise RequestError(
            f"prompt_logprobs {p.prompt_logprobs} for {num_wanted} tokens is too much; at most {MAX_PROMPT_LOGPROB_PAIRS:,} "
            "log-probabilities of a prompt can be had.",
            param="prompt_logprobs",
        )
    if message.embed and (p.max_tokens or p.prompt_logprobs is not None):
        name = "max_tokens" if p.max_tokens else "prompt_logprobs"
        raise RequestError(f"An embedding has no {name}; send max_tokens 0 and no prompt_logprobs.", param=name)
