"""One request inside the engine: its tokens, how far they are computed, and the checks it must pass on arrival.

Knows no torch and no scheduling policy.
"""

import math
from collections.abc import Container, Iterable
from dataclasses import dataclass
from typing import Protocol

from workers.errors import AdapterNotLoadedError, RequestError
from workers.kv_cache.sequence import BlockSequence
from workers.lora.slots import NO_SLOT
from workers.protocol import BATCH_PRIORITY, FinishReason, GenerateRequest, SamplingParams, root_hash
from workers.sampling.grammar import Constraint
from workers.tracing.engine_spans import RequestSpans

MAX_TOP_LOGPROBS = 100
# All of a prompt's go out in one frame: this many (token, log-probability) pairs take about 15 MB.
MAX_PROMPT_LOGPROB_PAIRS = 1_000_000
MAX_BAD_WORDS = 1000
MAX_BAD_WORDS_TOKENS = 10_000
MAX_TOP_K = 2**31 - 1
UINT64 = 1 << 64


class PromptOutput(Protocol):
    """What a request reads from its prompt; see workers.engine.outputs.prompt_outputs."""

    @property
    def rows(self) -> range:
        """The positions that are still to be read."""
        ...

    @property
    def needs_logits(self) -> bool:
        """Whether it reads logits; otherwise hidden states."""
        ...


@dataclass(eq=False, slots=True)
class Request:
    """`sequence` holds prompt and output in a row."""

    request_id: str
    sampling: SamplingParams
    num_prompt_tokens: int
    sequence: BlockSequence
    # Order of arrival: the tie-break between equal priorities.
    arrival: int
    # It ends with as many tokens, prompt and output together, whatever the last one is.
    max_num_tokens: int
    priority: int = 0
    # The revision of the adapter to apply, None for the base model; and its slot while the request runs.
    adapter: str | None = None
    adapter_slot: int = NO_SLOT
    # Prompt tokens found in the prefix cache at first admission, until a delta has reported them.
    num_cached_tokens: int | None = None
    num_preemptions: int = 0
    # Steps that computed more than one token of it.
    num_prompt_chunks: int = 0
    # Of its newest token, while that is in flight: its row among the tokens of the step in flight. None: the host knows all tokens.
    unread_row: int | None = None
    # It has left the scheduler, because the token in flight is its last.
    has_left: bool = False
    # It is no longer in the engine. What a step in flight brings for it is dropped.
    has_ended: bool = False
    # Present once the grammar is compiled.
    constraint: Constraint | None = None
    prompt_output: PromptOutput | None = None
    # None for a request that is not traced.
    spans: RequestSpans | None = None

    @property
    def token_ids(self) -> list[int]:
        return self.sequence.token_ids

    @property
    def num_computed_tokens(self) -> int:
        return self.sequence.num_computed_tokens

    @property
    def num_tokens(self) -> int:
        return len(self.sequence.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.sequence.token_ids) - self.num_prompt_tokens

    @property
    def num_in_flight(self) -> int:
        """Tokens, 0 or 1, that are sampled, but that the host has not read yet. They come after `token_ids`."""
        return 0 if self.unread_row is None else 1

    @property
    def num_pending_tokens(self) -> int:
        """Tokens that are still to be computed, the one in flight among them."""
        sequence = self.sequence
        return len(sequence.token_ids) - sequence.num_computed_tokens + (self.unread_row is not None)

    @property
    def max_prefix_tokens(self) -> int:
        """How many tokens may come from the prefix cache, which has no logits and no hidden states: those must be computed."""
        if self.prompt_output is not None and self.prompt_output.rows:
            return self.prompt_output.rows.start
        return self.num_tokens - 1

    @property
    def order(self) -> tuple[int, int]:
        """Smaller is served first and preempted last."""
        return (self.priority, self.arrival)

    @property
    def is_background(self) -> bool:
        return self.priority >= BATCH_PRIORITY

    @property
    def is_held(self) -> bool:
        """Whether it cannot be part of a step, because the mask for its next token takes long."""
        if self.constraint is None:
            return False
        return self.constraint.is_held or (self.unread_row is not None and self.constraint.is_slow)

    def append(self, token_id: int) -> None:
        self.sequence.token_ids.append(token_id)
        if self.constraint is not None:
            self.constraint.accept(token_id)

    def stops(self, eos_token_ids: tuple[int, ...]) -> bool:
        """Whether the last token ends the request and is not part of its text."""
        token, sampling = self.token_ids[-1], self.sampling
        stops = token in sampling.stop_token_ids or (token in eos_token_ids and not sampling.ignore_eos)
        return stops and self.num_output_tokens > sampling.min_tokens

    def finish_reason(self, eos_token_ids: tuple[int, ...]) -> FinishReason | None:
        """Why the request ends with its last token, or with its prompt when it samples none; None if it goes on."""
        sampling = self.sampling
        if sampling.max_tokens and self.stops(eos_token_ids):
            return FinishReason.STOP
        if self.constraint is not None and self.constraint.is_finished:
            return FinishReason.STOP
        return FinishReason.LENGTH if self.is_at_limit() else None

    def is_at_limit(self) -> bool:
        """Whether it ends with its last token, the one in flight included, whatever that token is."""
        return len(self.sequence.token_ids) + (self.unread_row is not None) >= self.max_num_tokens


@dataclass(slots=True)
class ScheduledRequest:
    """A request and how many of its tokens the step computes. Never changes: it is not frozen, because that takes three times as long to
    make, and each step makes one for each of its requests. `of` finds out what follows from the request.

    num_before: its tokens that were computed before. completes: whether this step computes the request's last token, as it is now.
    samples: whether the logits of that token choose the next one in this step.
    """

    request: Request
    num_new_tokens: int
    num_before: int
    completes: bool
    samples: bool

    @classmethod
    def of(cls, request: Request, num_new_tokens: int) -> "ScheduledRequest":
        completes = num_new_tokens == request.num_pending_tokens
        num_before = request.sequence.num_computed_tokens
        return cls(request, num_new_tokens, num_before, completes, completes and request.sampling.max_tokens > 0)

    @property
    def prompt_rows(self) -> range:
        """Those of the positions that `prompt_output` still reads which this step computes."""
        if self.request.prompt_output is None:
            return range(0)
        start, unread = self.request.num_computed_tokens, self.request.prompt_output.rows
        return range(max(start, unread.start), min(start + self.num_new_tokens, unread.stop))


def make_request(
    message: GenerateRequest, *, arrival: int, vocab_size: int, max_model_len: int, adapters: Container[str] = ()
) -> Request:
    """Validates a request from the wire, so that nothing fails because of it later. `adapters`: revisions of the loaded ones.

    Raises RequestError with the field as `param`.
    """
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
    if message.adapter is not None and message.adapter not in adapters:
        raise AdapterNotLoadedError(f"The adapter {message.adapter!r} is not loaded on this replica.", param="adapter")
    if not message.prompt_token_ids:
        raise RequestError("The prompt has no tokens.", remedy="Send at least one.", param="prompt")
    num_tokens = len(message.prompt_token_ids) + len(message.output_token_ids)
    if num_tokens + min(sampling.max_tokens, 1) > max_model_len:
        including = " including at least one of output" if sampling.max_tokens else ""
        raise RequestError(
            f"The prompt has {num_tokens} tokens, but this model's context holds {max_model_len} tokens{including}.",
            remedy="Shorten the prompt.",
            param="prompt",
            code="context_length_exceeded",
        )
    if message.output_token_ids and len(message.output_token_ids) >= sampling.max_tokens:
        raise RequestError("output_token_ids already has max_tokens tokens.", param="max_tokens")
    return Request(
        request_id=message.request_id,
        sampling=sampling,
        num_prompt_tokens=len(message.prompt_token_ids),
        sequence=BlockSequence([*message.prompt_token_ids, *message.output_token_ids], root_hash(message.adapter)),
        arrival=arrival,
        max_num_tokens=min(len(message.prompt_token_ids) + sampling.max_tokens, max_model_len),
        priority=message.priority,
        adapter=message.adapter,
    )


def _check_tokens(param: str, token_ids: Iterable[int], vocab_size: int) -> None:
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            raise RequestError(
                f"{param} contains the token id {token_id}, which this model does not have.",
                remedy=f"Use ids from 0 to {vocab_size - 1}.",
                param=param,
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
            raise RequestError(f"{name} is {value}.", remedy=f"Use a value from {low} to {high}.", param=name)
    if p.top_p == 0.0:
        raise RequestError("top_p is 0.", remedy="Use a value above 0.", param="top_p")


def _check_lists(p: SamplingParams) -> None:
    if p.allowed_token_ids is not None and not p.allowed_token_ids:
        raise RequestError(
            "allowed_token_ids is empty.",
            remedy="Name at least one token, or leave it out.",
            param="allowed_token_ids",
        )
    if not all(p.bad_words):
        raise RequestError("bad_words has a word without tokens.", remedy="Remove it.", param="bad_words")
    if len(p.bad_words) > MAX_BAD_WORDS or sum(map(len, p.bad_words)) > MAX_BAD_WORDS_TOKENS:
        raise RequestError(
            "bad_words has too many words.",
            remedy=f"Send at most {MAX_BAD_WORDS} words, and {MAX_BAD_WORDS_TOKENS} tokens in all.",
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
            raise RequestError(
                f"{name} and structured_outputs cannot be combined.", remedy="Leave one of them out.", param=name
            )


def _check_prompt_outputs(message: GenerateRequest) -> None:
    p, num_prompt_tokens = message.sampling, len(message.prompt_token_ids)
    if not 0 <= p.prompt_logprobs_start < max(1, num_prompt_tokens):
        raise RequestError(
            f"prompt_logprobs_start is {p.prompt_logprobs_start}, but the prompt has the tokens 0 to {num_prompt_tokens - 1}.",
            param="prompt_logprobs_start",
        )
    num_tokens = num_prompt_tokens - p.prompt_logprobs_start
    if p.prompt_logprobs is not None and num_tokens * (1 + p.prompt_logprobs) > MAX_PROMPT_LOGPROB_PAIRS:
        raise RequestError(
            f"prompt_logprobs {p.prompt_logprobs} for {num_tokens} tokens exceeds the limit of {MAX_PROMPT_LOGPROB_PAIRS:,} "
            "log-probabilities of a prompt.",
            remedy="Lower prompt_logprobs or raise prompt_logprobs_start.",
            param="prompt_logprobs",
        )
    if message.embed and (p.max_tokens or p.prompt_logprobs is not None):
        name = "max_tokens" if p.max_tokens else "prompt_logprobs"
        raise RequestError(
            f"{name} cannot be combined with an embedding.",
            remedy="Send max_tokens 0 and no prompt_logprobs.",
            param=name,
        )
