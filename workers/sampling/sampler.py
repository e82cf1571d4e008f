"""From logits to tokens: a pure function of (logits, parameters, seed, position), row by row.

Position is the index of the output token. A row's token does not depend on other rows, on earlier calls or on the device's random state,
so a request continues anywhere: same seed, same position, same logits, same token. The one random number a token needs comes from a hash
of (seed, position); the token is found by inverting the cumulative distribution in the order of token ids. Knows torch and
SamplingParams; no requests, no scheduler.
"""

import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import torch

from workers.protocol import SamplingParams, TokenLogprob
from workers.sampling.logprobs import token_logprobs

# Below this, dividing by the temperature only amplifies rounding: such requests are greedy.
MIN_TEMPERATURE = 1e-4


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """One sequence to sample a token for. `token_ids` is prompt and output in a row, as repetition_penalty counts them.

    `mask`: [at least vocab_size / 8] uint8, the tokens that its grammar allows next, one bit each, the lowest bit of a byte first.
    """

    params: SamplingParams
    token_ids: Sequence[int]
    num_prompt_tokens: int
    mask: np.ndarray | None = None

    @property
    def position(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens


@dataclass(frozen=True, slots=True)
class Sampled:
    """A token, with its log-probability where one is requested. `token_id` None: every token is banned."""

    token_id: int | None
    logprob: TokenLogprob | None


@torch.inference_mode()
def sample(logits: torch.Tensor, rows: Sequence[SamplingRow], *, eos_token_ids: Sequence[int]) -> list[Sampled]:
    """logits: [len(rows), vocab_size] float32; may be overwritten. Reads the device once, at the end."""
    with_logprobs = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
    raw = logits[with_logprobs].clone() if with_logprobs else None
    for i, row in enumerate(rows):
        _adjust(logits[i], row, eos_token_ids)
    _apply_masks(logits, rows)
    best, token_ids = logits.max(dim=-1)
    random = [i for i, row in enumerate(rows) if row.params.temperature >= MIN_TEMPERATURE]
    if random:
        token_ids[random] = _draw(logits[random], [rows[i] for i in random])
    chosen, possible = torch.stack([token_ids, best > -torch.inf]).tolist()
    logprobs: dict[int, TokenLogprob] = {}
    if raw is not None:
        num_tops = [rows[i].params.logprobs or 0 for i in with_logprobs]
        found = token_logprobs(raw, [chosen[i] for i in with_logprobs], num_tops)
        logprobs = dict(zip(with_logprobs, found, strict=True))
    return [
        Sampled(token_id, logprobs.get(i)) if is_possible else Sampled(None, None)
        for i, (token_id, is_possible) in enumerate(zip(chosen, possible, strict=True))
    ]


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing else."""
    digest = blake2b(struct.pack("<QQ", seed % 2**64, position), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


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
    banned = {word[-1] for word in p.bad_words if _completes(word, output)}
    if row.position < p.min_tokens:
        banned |= {*p.stop_token_ids, *(() if p.ignore_eos else eos_token_ids)}
    if banned:
        logits[torch.tensor(sorted(banned), device=logits.device)] = -torch.inf
    if p.allowed_token_ids is not None:
        allowed = torch.tensor(p.allowed_token_ids, device=logits.device)
        kept = logits[allowed]
        logits.fill_(-torch.inf)
        logits[allowed] = kept


def _completes(word: Sequence[int], output: Sequence[int]) -> bool:
    """Whether the word's last token would complete it: the output ends with its other tokens."""
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


def _draw(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    """logits: [n, vocab_size] of rows with a temperature. Returns token ids [n]."""

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device)[:, None]

    logits = logits / column([row.params.temperature for row in rows]).float()
    truncated = [i for i, r in enumerate(rows) if r.params.top_k > 0 or r.params.top_p < 1 or r.params.min_p > 0]
    if truncated:
        logits[truncated] = _truncate(logits[truncated], [rows[i].params for i in truncated])
    # In double precision: a sum over 32,768 floats is off by more than the smallest probabilities.
    cumulative = logits.double().softmax(dim=-1).cumsum(dim=-1)
    total = cumulative[:, -1:].contiguous()
    u = column([uniform(row.params.seed, row.position) for row in rows])
    picked = torch.searchsorted(cumulative, u * total, right=True)
    # Rounding can raise u * total to total itself; take the last token with any probability then.
    last = torch.searchsorted(cumulative, total)
    # The clamp is for rows without any finite logit, whose sums are NaN.
    return torch.minimum(picked, last).squeeze(1).clamp(max=logits.shape[-1] - 1)


def _truncate(logits: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """Sets to -inf what min_p, then top_k, then top_p exclude; the most likely token always stays. logits: [n, vocab_size]."""
    vocab_size = logits.shape[-1]

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, device=logits.device)[:, None]

    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.softmax(dim=-1)
    excluded = probabilities < column([p.min_p for p in params]) * probabilities[:, :1]
    ranks = torch.arange(vocab_size, device=logits.device)
    excluded |= ranks >= column([p.top_k or vocab_size for p in params])
    probabilities = ordered.masked_fill(excluded, -torch.inf).softmax(dim=-1)
    # The smallest set whose sum reaches top_p: a token is excluded when those before it already reach it.
    before = probabilities.cumsum(dim=-1) - probabilities
    excluded |= before >= column([p.top_p for p in params])
    excluded[:, 0] = False
    return ordered.masked_fill(excluded, -torch.inf).gather(1, order.argsort(dim=-1))
