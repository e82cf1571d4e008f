"""What the kernels in sample.py and logprobs.py compute, in plain torch: adjusted logits, one token of each row, and log-probabilities.
Every device gives the same tokens.

A logit becomes a whole number, its weight: exp((logit - best) / temperature) * 2**44, rounded down. Sums of whole numbers are exact in any
order, so min_p, top_k, top_p and the draw are exact comparisons, on a CPU and on a GPU alike. What comes before them uses float32
operations that every device rounds alike: no exp of a library, no fused multiply-add. Knows tensors; no requests, no seeds.

Precision: a weight is off by at most one unit and 6e-6 of itself: the rounding in float32, which is largest for the least likely tokens.
A token that is 2**44 times less likely than the most likely one, 30.5 nats, has weight 0 and is never drawn.
"""

from dataclasses import dataclass

import torch

WEIGHT_BITS = 44
# Fractions, of top_p and of the random number, are whole numbers from 0 to 2**62.
FRACTION_BITS = 62
# A sum of weights, at most 2**44 * MAX_VOCAB_SIZE, is less than 2**63.
MAX_VOCAB_SIZE = 2**18

# In a count: the prompt has the token. The bits below count it in the output.
IN_PROMPT = 1 << 30

# As many tokens are looked for, however few are asked for. More than anybody may ask for.
NUM_MOST_LIKELY = 128

# exp(x) = 2**n * exp(r), r = x - n * ln 2 in two steps, and exp(r) = 1 + r + r**2 * polynomial(r): `expf` of Cephes, S. Moshier 1989.
LOG2_E = 1.44269504088896341
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4
EXP_COEFFICIENTS = (
    1.9875691500e-4,
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    5.0000001201e-1,
)
# From here on, every weight is 0: 2**44 is exp(30.5).
MIN_EXPONENT = -32.0


@dataclass(frozen=True, slots=True)
class SamplingTable:
    """The parameters of n rows, on the device of their logits, and what the rows need at all.

    floats: [4, n] float32, integers: [6, n] int64; the properties name their lines. masks: [num_masks, ceil(vocab_size / 8)] uint8, a
    bit for each allowed token, the lowest bit of a byte first.
    """

    floats: torch.Tensor
    integers: torch.Tensor
    masks: torch.Tensor
    penalizes: bool
    draws: bool
    truncates: bool

    @property
    def num_rows(self) -> int:
        return self.floats.shape[1]

    @property
    def inverse_temperature(self) -> torch.Tensor:
        """1 / temperature; 0 in greedy rows."""
        return self.floats[0]

    @property
    def repetition_penalty(self) -> torch.Tensor:
        return self.floats[1]

    @property
    def presence_penalty(self) -> torch.Tensor:
        return self.floats[2]

    @property
    def frequency_penalty(self) -> torch.Tensor:
        return self.floats[3]

    @property
    def random(self) -> torch.Tensor:
        """From 0 to 2**62 - 1."""
        return self.integers[0]

    @property
    def top_p(self) -> torch.Tensor:
        """In units of 2**-62."""
        return self.integers[1]

    @property
    def min_weight(self) -> torch.Tensor:
        """min_p in weights."""
        return self.integers[2]

    @property
    def top_k(self) -> torch.Tensor:
        """At least vocab_size where it is off."""
        return self.integers[3]

    @property
    def slot(self) -> torch.Tensor:
        """The row of the counts that belongs to this row; -1 in rows without penalties."""
        return self.integers[4]

    @property
    def mask_index(self) -> torch.Tensor:
        """-1 in rows that no mask restricts."""
        return self.integers[5]


def adjust(logits: torch.Tensor, counts: torch.Tensor, table: SamplingTable) -> torch.Tensor:
    """Logits after penalties and masks, in a new tensor. logits: [n, vocab_size] float32; counts: [num_slots, vocab_size] int32.

    Repetition (CTRL, Keskar et al. 2019) divides positive logits and multiplies negative ones of tokens in prompt or output. Presence
    and frequency subtract from those in the output.
    """
    if table.penalizes:
        slot = table.slot
        seen = counts.index_select(0, slot.clamp(min=0)).masked_fill_((slot < 0)[:, None], 0)
        times = seen & (IN_PROMPT - 1)
        penalty = table.repetition_penalty[:, None]
        repeated = torch.where(logits > 0, logits / penalty, logits * penalty)
        logits = torch.where(seen != 0, repeated, logits)
        lowered = logits - (table.presence_penalty[:, None] + table.frequency_penalty[:, None] * times.float())
        logits = torch.where(times > 0, lowered, logits)
    if len(table.masks):
        bits = table.masks.index_select(0, table.mask_index.clamp(min=0))
        shifts = torch.arange(8, dtype=torch.uint8, device=logits.device)
        allowed = ((bits[:, :, None] >> shifts) & 1).bool().flatten(1)[:, : logits.shape[-1]]
        logits = logits.masked_fill(~allowed & (table.mask_index >= 0)[:, None], -torch.inf)
    return logits


def edit(logits: torch.Tensor, index: torch.Tensor, value: torch.Tensor) -> None:
    """Adds to single logits in place; -inf bans. logits: [n, vocab_size]; index: [num_edits] int64, row * vocab_size + token, each at
    most once; value: [num_edits] float32.
    """
    flat = logits.view(-1)
    flat.index_copy_(0, index, torch.where(value == -torch.inf, value, flat.index_select(0, index) + value))


def choose(logits: torch.Tensor, counts: torch.Tensor, table: SamplingTable) -> torch.Tensor:
    """[2, n] int64: the rows' tokens, 0 where there is none, and the same with -1 where there is none. Adds the tokens to the counts.

    A row without a finite logit, or with a NaN, has no token. Greedy rows take the first of the largest logits. logits: [n, vocab_size]
    float32, adjusted; counts: [num_slots, vocab_size] int32, changed in place.
    """
    best, token_ids = logits.max(dim=-1)
    possible = best > -torch.inf
    if table.draws:
        weights = token_weights(logits, best, inverse_temperature=table.inverse_temperature)
        if table.truncates:
            weights = truncate(weights, logits, min_weight=table.min_weight, top_k=table.top_k, top_p=table.top_p)
        token_ids = torch.where(table.inverse_temperature > 0, draw(weights, table.random), token_ids)
    chosen = torch.stack((torch.where(possible, token_ids, 0), torch.where(possible, token_ids, -1)))
    if table.penalizes:
        counted = possible & (table.slot >= 0)
        index = table.slot.clamp(min=0) * logits.shape[-1] + chosen[0]
        counts.view(-1).scatter_add_(0, index, counted.to(counts.dtype))
    return chosen


def find_logprobs(
    logits: torch.Tensor, token_ids: torch.Tensor, *, rows: torch.Tensor | None = None, max_top: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of a token of each row, and of its k = min(max_top, vocab_size) most likely ones. A row's values depend on that row
    alone.

    logits: [n, vocab_size] float32; token_ids: [n] int64; rows: [m] int64, the rows that are wanted, None for all. Returns values
    [m, 1 + k] float32, the token's and the most likely ones', the largest first, and ids [m, 2 + k] int32: the token, its rank, 1 for the
    most likely one, and the most likely ones. Tokens are ordered by logit, equal ones by id.
    """
    if rows is not None:
        logits, token_ids = logits.index_select(0, rows), token_ids.index_select(0, rows)
    token_ids = token_ids[:, None]
    ranks = (logits > logits.gather(1, token_ids)).sum(dim=-1, keepdim=True) + 1
    logprobs = logits.log_softmax(dim=-1)
    top_ids = most_likely(logits, min(max_top, logits.shape[-1]))
    values = logprobs.gather(1, torch.cat((token_ids, top_ids), dim=1))
    return values, torch.cat((token_ids, ranks, top_ids), dim=1).to(torch.int32)


def most_likely(logits: torch.Tensor, k: int) -> torch.Tensor:
    """Ids [n, k] of the largest logits [n, vocab_size], equal ones by id. Logits in bfloat16 are often equal.

    `topk` takes any of equal ones, and which ones depends on how many are asked for: on what other rows need.
    """
    if k == 0:
        return torch.empty((len(logits), 0), dtype=torch.int64, device=logits.device)
    values, ids = logits.topk(min(max(k, NUM_MOST_LIKELY), logits.shape[-1]), dim=-1)
    ids, by_id = ids.sort(dim=-1)
    by_value = values.gather(1, by_id).argsort(dim=-1, descending=True, stable=True)
    return ids.gather(1, by_value[:, :k])


def token_weights(logits: torch.Tensor, best: torch.Tensor, *, inverse_temperature: torch.Tensor) -> torch.Tensor:
    """int64 weights of logits [n, vocab_size]; the largest is 2**WEIGHT_BITS. best: [n], the rows' largest logits;
    inverse_temperature: [n] float32. Means nothing in rows without a possible token.
    """
    best = best[:, None]
    # The condition is for infinite logits, whose difference is NaN.
    exponent = (
        (logits - best).masked_fill_(logits == best, 0.0).mul_(inverse_temperature[:, None]).clamp_(min=MIN_EXPONENT)
    )
    n = (exponent * LOG2_E).add_(0.5).floor_()
    r = exponent.sub_(n * LN2_HIGH).sub_(n * LN2_LOW)
    y = torch.full_like(r, EXP_COEFFICIENTS[0])
    for coefficient in EXP_COEFFICIENTS[1:]:
        y.mul_(r).add_(coefficient)
    y.mul_(r).mul_(r).add_(r).add_(1.0)
    scale = n.to(torch.int32).add_(WEIGHT_BITS + 127).bitwise_left_shift_(23).view(torch.float32)
    return y.mul_(scale).to(torch.int64)


def truncate(
    weights: torch.Tensor, logits: torch.Tensor, *, min_weight: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor
) -> torch.Tensor:
    """The weights, 0 for what min_p, then top_k, then top_p exclude; the first of the largest logits always stays.

    weights, logits: [n, vocab_size]; the rest: [n] int64, see SamplingTable. Tokens are ordered by logit, equal ones by id. top_p keeps
    the smallest beginning of that order whose weights reach top_p of all that the others left.
    """
    order = logits.argsort(dim=-1, descending=True, stable=True)
    kept = weights.masked_fill(weights < min_weight[:, None], 0).gather(1, order)
    ranks = torch.arange(logits.shape[-1], device=logits.device)
    kept.masked_fill_(ranks >= top_k[:, None], 0)
    before = kept.cumsum(dim=-1).sub_(kept)
    enough = fraction_of(top_p, kept.sum(dim=-1)).clamp_(min=1)
    kept.masked_fill_(before >= enough[:, None], 0)
    return torch.empty_like(kept).scatter_(1, order, kept)


def draw(weights: torch.Tensor, random: torch.Tensor) -> torch.Tensor:
    """Token ids [n]: the first token at which the sum of weights exceeds random / 2**62 of the whole. weights: [n, vocab_size] int64."""
    cumulative = weights.cumsum(dim=-1)
    target = fraction_of(random, cumulative[:, -1])
    # The clamp is for rows without a possible token.
    return torch.searchsorted(cumulative, target[:, None], right=True).squeeze(1).clamp_(max=weights.shape[-1] - 1)


def fraction_of(fraction: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """fraction * total / 2**62, rounded down: the upper half of a product of 124 bits, from parts of 31. Both: int64 from 0 to 2**62."""
    f_high, f_low, t_high, t_low = fraction >> 31, fraction & 0x7FFFFFFF, total >> 31, total & 0x7FFFFFFF
    return f_high * t_high + ((f_high * t_low + f_low * t_high + (f_low * t_low >> 31)) >> 31)
