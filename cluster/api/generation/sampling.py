"""Turns a validated body into the engine's SamplingParams: defaults, seeds, and the checks that need the model.

Knows the model's facts and OpenAI's rules for lengths. Knows no prompt text and no HTTP.
"""

import hashlib
import secrets
from collections.abc import Sequence
from typing import TypeVar

from cluster.api.schemas.base import GenerationRequest
from cluster.config.sampling_defaults import NO_DEFAULTS, SamplingDefaults
from cluster.text.tokenizer import Tokenizer
from workers.errors import RequestError
from workers.protocol import EngineFacts, SamplingParams

DEFAULT_COMPLETION_TOKENS = 16
_MAX_SEED = 2**63 - 1
_Number = TypeVar("_Number", int, float)


def derive_seed(seed: int, index: int) -> int:
    """The seed of a request's index-th sequence (0 <= result < 2**63).

    The first sequence keeps the request's own seed, so that n=1 and the first of n=4 are the same sequence.
    """
    if index == 0:
        return seed & _MAX_SEED
    digest = hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") & _MAX_SEED


def random_seed() -> int:
    """For a request without a seed."""
    return secrets.randbits(63)


def check_token_ids(token_ids: list[int], *, param: str, vocab_size: int) -> None:
    """Raises RequestError if the model does not have one of the ids."""
    if token_ids and not (min(token_ids) >= 0 and max(token_ids) < vocab_size):
        bad = next(i for i in token_ids if not 0 <= i < vocab_size)
        raise RequestError(
            f"{param!r} contains the token id {bad}, which this model does not have.",
            remedy=f"Use ids from 0 to {vocab_size - 1}.",
            param=param,
        )


def too_long(num_prompt_tokens: int, *, param: str, max_model_len: int, at_least: bool = False) -> RequestError:
    """The error for a prompt that leaves no room for output."""
    return RequestError(
        f"This model's maximum context length is {max_model_len} tokens, including at least one output token; the prompt has "
        f"{'at least ' if at_least else ''}{num_prompt_tokens} tokens.",
        remedy="Shorten the prompt.",
        param=param,
        code="context_length_exceeded",
    )


def resolve_max_tokens(
    requested: int | None, *, default: int | None, num_prompt_tokens: int, facts: EngineFacts, prompt_param: str
) -> int:
    """How many tokens may be generated. default None: all that fit in the context. Raises RequestError if they do not fit."""
    room = facts.max_model_len - num_prompt_tokens
    if room < 1:
        raise too_long(num_prompt_tokens, param=prompt_param, max_model_len=facts.max_model_len)
    if requested is None:
        return room if default is None else min(default, room)
    if requested > room:
        raise RequestError(
            f"This model's maximum context length is {facts.max_model_len} tokens, but the request needs "
            f"{num_prompt_tokens + requested}: {num_prompt_tokens} in the prompt and {requested} for the output.",
            remedy="Shorten the prompt or the output.",
            param="max_tokens",
            code="context_length_exceeded",
        )
    return requested


def default_completion_tokens(body: GenerationRequest, defaults: SamplingDefaults) -> int:
    """OpenAI's 16, or fewer where the model's own limit is lower; never below min_tokens."""
    default = min(DEFAULT_COMPLETION_TOKENS, defaults.max_tokens or DEFAULT_COMPLETION_TOKENS)
    return max(default, body.min_tokens or 0)


def default_chat_tokens(body: GenerationRequest, defaults: SamplingDefaults) -> int | None:
    """The model's own limit, but never below min_tokens; None without one: all that fit."""
    return None if defaults.max_tokens is None else max(defaults.max_tokens, body.min_tokens or 0)


def sampling_params(
    body: GenerationRequest,
    *,
    max_tokens: int,
    seed: int,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
    grammar: str | None = None,
    tokenizer: Tokenizer,
    facts: EngineFacts,
    defaults: SamplingDefaults = NO_DEFAULTS,
) -> SamplingParams:
    """defaults: the model's, for what the body does not say.

    Raises RequestError for token ids the model does not have, and for min_tokens above max_tokens.
    """
    min_tokens = body.min_tokens or 0
    if min_tokens > max_tokens:
        raise RequestError(
            f"'min_tokens' is {min_tokens}, more than the {max_tokens} tokens that may be generated.",
            remedy="Lower it, or raise 'max_tokens'.",
            param="min_tokens",
        )
    logit_bias, allowed = body.logit_bias or {}, body.allowed_token_ids
    stop_token_ids = [*(body.stop_token_ids or []), *_special_stops(body.stop_strings, tokenizer)]
    check_token_ids(stop_token_ids, param="stop_token_ids", vocab_size=facts.vocab_size)
    check_token_ids(list(logit_bias), param="logit_bias", vocab_size=facts.vocab_size)
    check_token_ids(allowed or [], param="allowed_token_ids", vocab_size=facts.vocab_size)
    if allowed is not None and min_tokens and set(allowed) <= {*stop_token_ids, *_ends(body, facts)}:
        raise RequestError(
            "'allowed_token_ids' allows only tokens that end the output, which 'min_tokens' forbids.",
            remedy="Allow other tokens as well.",
            param="allowed_token_ids",
        )
    top_p = _first(body.top_p, defaults.top_p, 1.0)
    return SamplingParams(
        max_tokens=max_tokens,
        seed=seed,
        temperature=0.0 if top_p == 0 else _first(body.temperature, defaults.temperature, 1.0),
        top_p=top_p or 1.0,
        top_k=max(_first(body.top_k, defaults.top_k, 0), 0),
        min_p=_first(body.min_p, defaults.min_p, 0.0),
        repetition_penalty=_first(body.repetition_penalty, defaults.repetition_penalty, 1.0),
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=logit_bias,
        min_tokens=min_tokens,
        stop_token_ids=tuple(stop_token_ids),
        ignore_eos=bool(body.ignore_eos),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        allowed_token_ids=None if allowed is None else tuple(sorted(set(allowed))),
        bad_words=tokenizer.bad_words_ids(body.bad_words) if body.bad_words else (),
        grammar=grammar,
    )


def _first(requested: _Number | None, default: _Number | None, otherwise: _Number) -> _Number:
    """The request's value, else the model's, else everybody's."""
    return next(value for value in (requested, default, otherwise) if value is not None)


def _special_stops(stops: Sequence[str], tokenizer: Tokenizer) -> list[int]:
    """The tokens that these stop strings name, such as "<|im_end|>": they have no text in which the string could be found."""
    return [token_id for stop in stops if (token_id := tokenizer.control_token_id(stop)) is not None]


def _ends(body: GenerationRequest, facts: EngineFacts) -> tuple[int, ...]:
    return () if body.ignore_eos else facts.eos_token_ids
