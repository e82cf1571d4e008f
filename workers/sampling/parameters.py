"""A request's sampling parameters in the form of a SamplingTable: what is the same for all of its tokens is prepared once.

Knows SamplingParams, numpy and the units of workers.kernels.sampling.sample_specification; no device, no slots.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from workers.kernels.sampling.sample_specification import IN_PROMPT
from workers.protocol import SamplingParams
from workers.sampling.pending import DeviceRow
from workers.sampling.sampler import MIN_TEMPERATURE, completes, min_p_weight, random_number, top_p_fraction

# Logits to change: token ids [n] int64, each once, and what to add to their logits [n] float32; -inf bans.
Edits = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True, slots=True)
class PreparedParams:
    """`floats` are a row's column of SamplingTable.floats; of its column of integers, what it has of its own is missing."""

    params: SamplingParams
    floats: tuple[float, float, float, float]
    top_p: int
    min_weight: int
    top_k: int
    # allowed_token_ids, in the form of a grammar's mask.
    mask: np.ndarray | None
    # logit_bias and bad words of one token; then also what min_tokens bans, for the positions before it.
    edits: Edits
    early_edits: Edits
    long_bad_words: Sequence[Sequence[int]]
    # Whether the request needs these at all.
    draws: bool
    truncates: bool
    penalizes: bool
    edits_logits: bool

    def random_at(self, position: int) -> int:
        """See SamplingTable.random."""
        return random_number(self.params.seed, position) if self.draws else 0

    def edits_of(self, row: DeviceRow) -> Edits:
        edits = self.early_edits if row.position < self.params.min_tokens else self.edits
        if self.long_bad_words:
            assert row.num_in_flight == 0, "bad_words of several tokens compare with all tokens of the output"
            output = row.token_ids[row.num_prompt_tokens :]
            edits = _with_bans(edits, (word[-1] for word in self.long_bad_words if completes(word, output)))
        return edits

    def mask_of(self, row: DeviceRow) -> np.ndarray | None:
        """[ceil(vocab_size / 8)] uint8 or longer: the tokens that allowed_token_ids and the row's own mask allow; None for all."""
        if self.mask is None or row.mask is None:
            return self.mask if row.mask is None else row.mask
        return self.mask & row.mask[: len(self.mask)]


def prepare(params: SamplingParams, *, vocab_size: int, eos_token_ids: Sequence[int]) -> PreparedParams:
    p = params
    bias = np.array(list(p.logit_bias), dtype=np.int64), np.array(list(p.logit_bias.values()), dtype=np.float32)
    edits = _with_bans(bias, (word[-1] for word in p.bad_words if len(word) == 1))
    stops = (*p.stop_token_ids, *(() if p.ignore_eos else eos_token_ids)) if p.min_tokens else ()
    mask = None
    if p.allowed_token_ids is not None:
        allowed = np.zeros(vocab_size, dtype=bool)
        allowed[list(p.allowed_token_ids)] = True
        mask = np.packbits(allowed, bitorder="little")
    draws = p.temperature >= MIN_TEMPERATURE
    return PreparedParams(
        params=p,
        floats=(1 / p.temperature if draws else 0.0, p.repetition_penalty, p.presence_penalty, p.frequency_penalty),
        top_p=top_p_fraction(p.top_p),
        min_weight=min_p_weight(p.min_p),
        top_k=p.top_k or vocab_size,
        mask=mask,
        edits=edits,
        early_edits=_with_bans(edits, stops),
        long_bad_words=[word for word in p.bad_words if len(word) > 1],
        draws=draws,
        truncates=draws and (p.top_k > 0 or p.top_p < 1 or p.min_p > 0),
        penalizes=p.repetition_penalty != 1.0 or p.presence_penalty != 0.0 or p.frequency_penalty != 0.0,
        edits_logits=bool(p.logit_bias or p.bad_words or p.min_tokens),
    )


def count_tokens(token_ids: Sequence[int], num_prompt_tokens: int, *, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of a request's history, each once, and their counts as SamplingTable's kernels read them: [n] int64, [n] int32."""
    tokens = np.asarray(token_ids, dtype=np.int64)
    counts = np.bincount(tokens[num_prompt_tokens:], minlength=vocab_size).astype(np.int32)
    counts[tokens[:num_prompt_tokens]] |= IN_PROMPT
    seen = np.flatnonzero(counts)
    return seen, counts[seen]


def _with_bans(edits: Edits, banned: Iterable[int]) -> Edits:
    """Bans overrule: a banned token has no other edit."""
    bans = np.unique(np.array(list(banned), dtype=np.int64))
    if not len(bans):
        return edits
    token_ids, values = edits
    kept = ~np.isin(token_ids, bans)
    infinite = np.full(len(bans), -np.inf, dtype=np.float32)
    return np.concatenate((token_ids[kept], bans)), np.concatenate((values[kept], infinite))
