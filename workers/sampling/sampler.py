"""From logits to tokens: a pure function of (logits, parameters, seed, position), row by row. The specification, and the CPU's sampler.

Position is the index of the output token. A row's token does not depend on other rows, on earlier calls or on the device's random state,
so a request continues anywhere: same seed, same position, same logits, same token. The one random number a token needs comes from a hash
of (seed, position); the token is found by inverting the cumulative distribution in the order of token ids. Probabilities are whole numbers,
see workers.kernels.sampling.sample_specification, which also says how precise they are: so a GPU finds the same token. Knows torch and
SamplingParams; no requests, no scheduler.
"""

import math
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
import torch

from workers.kernels.sampling.sample_specification import (
    FRACTION_BITS,
    WEIGHT_BITS,
    draw,
    fraction_of,
    token_weights,
)
from workers.native.largest import largest
from workers.protocol import SamplingParams, TokenLogprob
from workers.sampling.logprobs import compute_logprobs, list_logprobs

# Below this, dividing by the temperature only amplifies rounding: such requests are greedy.
MIN_TEMPERATURE = 1e-4
# Logits whose weights are computed at a time: what that needs in between stays in the cache of a core.
LOGITS_AT_ONCE = 1 << 16


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """One sequence to sample a token for. `token_ids` is prompt and output in a row, as repetition_penalty counts them.

    `mask`: [at least vocab_size / 8] uint8, the tokens that its grammar allows next, one bit each, the lowest bit of a byte first.
    """

    params: SamplingParams
    token_ids: Sequence[int]
    num_prompt_tokens: int
    mask: np.ndarray | None = None
    # Whether its token is the one with the largest logit, and nothing else is asked for.
    is_plain: bool = field(init=False)

    def __post_init__(self) -> None:
        p = self.params
        is_plain = p.temperature < MIN_TEMPERATURE and p.logprobs is None and self.mask is None and not _is_adjusted(p)
        object.__setattr__(self, "is_plain", is_plain)

    @property
    def position(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens


class Sampled(NamedTuple):
    """A token, with its log-probability where one is requested. `token_id` None: every token is banned."""

    token_id: int | None
    logprob: TokenLogprob | None


@torch.inference_mode()
def sample(logits: torch.Tensor, rows: Sequence[SamplingRow], *, eos_token_ids: Sequence[int]) -> list[Sampled]:
    """logits: [len(rows), vocab_size] float32; may be overwritten. For the CPU: on a GPU, every row would wait for the device."""
    if all(row.is_plain for row in rows):
        best, places = largest(logits)
        are_possible = (best > -torch.inf).tolist()
        return [
            Sampled(t if possible else None, None) for t, possible in zip(places.tolist(), are_possible, strict=True)
        ]
    with_logprobs = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
    raw = logits[with_logprobs].clone() if with_logprobs else None
    for i, row in enumerate(rows):
        if _is_adjusted(row.params):
            _adjust(logits[i], row, eos_token_ids)
    _apply_masks(logits, rows)
    best, token_ids = largest(logits)
    possible, chosen = (best > -torch.inf).tolist(), token_ids.tolist()
    random = [i for i, row in enumerate(rows) if possible[i] and row.params.temperature >= MIN_TEMPERATURE]
    for some in _slices(random, max(1, LOGITS_AT_ONCE // logits.shape[-1])):
        for i, token_id in zip(some, _draw(logits[some], best[some], [rows[i] for i in some]), strict=True):
            chosen[i] = token_id
    logprobs: dict[int, TokenLogprob] = {}
    if raw is not None:
        num_tops = [rows[i].params.logprobs or 0 for i in with_logprobs]
        tokens = torch.tensor([chosen[i] for i in with_logprobs])
        found = list_logprobs(compute_logprobs(raw, tokens, max_top=max(num_tops)), num_tops)
        logprobs = dict(zip(with_logprobs, found, strict=True))
    return [
        Sampled(token_id, logprobs.get(i)) if is_possible else Sampled(None, None)
        for i, (token_id, is_possible) in enumerate(zip(chosen, possible, strict=True))
    ]


def random_number(seed: int, position: int) -> int:
    """A whole number from 0 to 2**62 - 1 that depends on nothing else."""
    digest = blake2b(struct.pack("<QQ", seed % 2**64, position), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> (64 - FRACTION_BITS)


def top_p_fraction(top_p: float) -> int:
    """In units of 2**-62."""
    return int(top_p * 2**FRACTION_BITS)


def min_p_weight(min_p: float) -> int:
    """The smallest weight that is min_p of the largest, which is 2**WEIGHT_BITS."""
    return math.ceil(min_p * 2**WEIGHT_BITS)


def _is_adjusted(p: SamplingParams) -> bool:
    """Whether `_adjust` may change anything. Most rows ask for nothing, and to look costs less than their view of the logits."""
    return bool(
        p.repetition_penalty != 1.0
        or p.presence_penalty
        or p.frequency_penalty
        or p.logit_bias
        or p.bad_words
        or p.min_tokens
        or p.allowed_token_ids is not None
    )


def _adjust(logits: torch.Tensor, row: SamplingRow, eos_token_ids: Sequence[int]) -> None:
    """logits: [vocab_size], changed in place: penalties, then bias, then bans, which nothing lifts."""
    p = row.params
    if p.repetition_penalty != 1.0:
        # On prompt and output alike (CTRL, Keskar et al. 2019): divide positive logits, multiply negative ones.
        seen = torch.tensor(sorted(set(row.token_ids)), device=logits.device)
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / p.repetition_penalty, values * p.repetition_penalty)
    if p.presence_penalty or p.frequency_penalty:
        counts = Counter(row.token_ids[row.num_prompt_tokens :])
        if counts:
            seen = torch.tensor(list(counts), device=logits.device)
            times = torch.tensor(list(counts.values()), dtype=logits.dtype, device=logits.device)
            logits[seen] -= p.presence_penalty + p.frequency_penalty * times
    if p.logit_bias:
        biased = torch.tensor(list(p.logit_bias), device=logits.device)
        logits[biased] += torch.tensor(list(p.logit_bias.values()), dtype=logits.dtype, device=logits.device)
    output = row.token_ids[row.num_prompt_tokens :] if p.bad_words else ()
    banned = {word[-1] for word in p.bad_words if completes(word, output)}
    if row.position < p.min_tokens:
        banned |= {*p.stop_token_ids, *(() if p.ignore_eos else eos_token_ids)}
    if banned:
        logits[torch.tensor(sorted(banned), device=logits.device)] = -torch.inf
    if p.allowed_token_ids is not None:
        allowed = torch.tensor(p.allowed_token_ids, device=logits.device)
        kept = logits[allowed]
        logits.fill_(-torch.inf)
        logits[allowed] = kept


def completes(word: Sequence[int], output: Sequence[int]) -> bool:
    """Whether a bad word's last token would complete it: the output ends with its other tokens."""
    num_before = len(word) - 1
    return num_before == 0 or list(output[-num_before:]) == list(word[:-1])


def _apply_masks(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> None:
    """logits: [len(rows), vocab_size], changed in place: tokens that a row's mask does not allow become -inf."""
    masked = [i for i, row in enumerate(rows) if row.mask is not None]
    if not masked:
        return
    packed = torch.from_numpy(np.stack([row.mask for row in rows if row.mask is not None])).to(logits.device)
    shifts = torch.arange(8, dtype=torch.uint8, device=logits.device)
    allowed = ((packed[:, :, None] >> shifts) & 1).bool().flatten(1)[:, : logits.shape[-1]]
    logits[masked] = logits[masked].masked_fill(~allowed, -torch.inf)


def _slices(indices: list[int], size: int) -> Iterator[list[int]]:
    return (indices[begin : begin + size] for begin in range(0, len(indices), size))


def _draw(logits: torch.Tensor, best: torch.Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    """logits: [n, vocab_size] of rows with a temperature and a possible token; best: [n], their largest. Returns token ids."""
    inverse_temperature = torch.tensor([1 / row.params.temperature for row in rows])
    random = torch.tensor([random_number(row.params.seed, row.position) for row in rows])
    weights = token_weights(logits, best, inverse_temperature=inverse_temperature)
    token_ids: list[int] = draw(weights, random).tolist()
    for i, row in enumerate(rows):
        p = row.params
        if p.top_k > 0 or p.top_p < 1 or p.min_p > 0:
            token_ids[i] = _draw_truncated(logits[i], weights[i], params=p, random=random[i : i + 1])
    return token_ids


def _draw_truncated(
    logits: torch.Tensor, weights: torch.Tensor, *, params: SamplingParams, random: torch.Tensor
) -> int:
    """What `draw` after `truncate` gives, but only logits that may stay are sorted. logits, weights: [vocab_size]; random: [1] int64."""
    vocab_size = logits.shape[-1]
    weights = weights.masked_fill(weights < min_p_weight(params.min_p), 0)
    total, top_p = weights.sum(), torch.tensor(top_p_fraction(params.top_p))
    if 0 < params.top_k < vocab_size:
        smallest = logits.topk(params.top_k, sorted=False).values.min()
    else:
        # All tokens of at most this weight have together at most what top_p excludes.
        negligible = (total - fraction_of(top_p, total).clamp_(min=1)) // vocab_size
        smallest = logits.masked_fill(weights <= negligible, torch.inf).min()
    candidates = (logits >= smallest).nonzero().squeeze(1)
    order = logits[candidates].argsort(descending=True, stable=True)
    kept = weights[candidates[order]]
    if 0 < params.top_k < vocab_size:
        kept[params.top_k :] = 0
        total = kept.sum()
    kept.masked_fill_(kept.cumsum(0).sub_(kept) >= fraction_of(top_p, total).clamp_(min=1), 0)
    return int(candidates[draw(torch.empty_like(kept).scatter_(0, order, kept)[None], random)])
