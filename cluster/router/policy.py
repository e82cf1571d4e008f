"""Which replica takes a request: pure functions of what is known about the replicas, vectorized over them.

Knows numbers only, by slot; the clock, the replicas and the counters stay in router.py, the blocks in prefix_index.py.

The default, `prefix`, predicts the time to the first token on every replica: the prompt tokens that wait there and the part of
this prompt that its cache does not hold, at its speed; running sequences slow that. A cached prefix thus counts for the seconds it saves
and no more, so that a popular prefix spreads as soon as its holder's queue is longer than what computing it anew takes. A
replica that holds far more sequences than its share is not chosen at all (consistent hashing with bounded loads), since many
short prefills with long outputs fill a replica without ever showing in its prompt queue.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

PolicyName = Literal["prefix", "least_load", "round_robin"]
POLICIES: tuple[PolicyName, ...] = get_args(PolicyName)

STREAM_S = 10.0  # about a stream's life: on a full replica one of max_num_seqs ends every so many seconds
HIGH_KV_USAGE = 0.9  # beyond this, a new prompt soon preempts another
MAX_IMBALANCE = 1.5  # at most so many times the mean occupancy, once occupancy matters
FREE_IMBALANCE = 0.25  # of max_num_seqs: below this, uneven is fine
_TIES = {"prefix": 1.01, "least_load": 1.0, "round_robin": 1.0}  # predictions within 1 % are equal
SPEED_NOISE = 1.5  # measured speeds this far apart may be of equal machines
PROOF_TOKENS = 1024  # waiting on a replica whose slowness counts
DEFAULT_TOKENS_PER_S = 4000.0  # as long as no replica has computed a prompt


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What is known about the replicas, by slot; all arrays have one length. Slots without a replica are not available."""

    available: NDArray[np.bool_]
    num_requests: NDArray[np.int64]  # sequences there: the larger of what the gateway sent and what the replica reports
    pending_tokens: NDArray[np.float64]  # prompt tokens still to be computed, with those a report cannot know yet
    tokens_per_s: NDArray[np.float64]  # prefill speed; 0 where unknown
    kv_usage: NDArray[np.float64]  # 0 to 1
    max_num_seqs: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class RequestView:
    """What a policy knows of a request. `cached_tokens` is by slot: PrefixIndex.match times the block size."""

    num_tokens: int  # prompt and output tokens so far: what a replica must have computed for the next token
    cached_tokens: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Decision:
    """`estimated_wait_s`: until the first token, as far as prompts decide it."""

    slot: int
    num_cached_tokens: int
    estimated_wait_s: float
    policy: PolicyName
    num_available: int

    @property
    def reason(self) -> str:
        """One clause for logs and people."""
        among = f"of {self.num_available} available replicas"
        if self.policy == "round_robin":
            return f"next in turn {among}"
        if self.policy == "least_load":
            return f"fewest requests {among}"
        return (
            f"soonest first token {among}: {self.num_cached_tokens} tokens cached, "
            f"{self.estimated_wait_s:.3f} s estimated"
        )


@dataclass(frozen=True, slots=True)
class Row:
    """One replica as a decision saw it. The lowest score wins; None: not eligible."""

    slot: int
    available: bool
    num_cached_tokens: int
    pending_tokens: float
    num_requests: int
    estimated_wait_s: float
    score: float | None
    chosen: bool


def choose(policy: PolicyName, snapshot: Snapshot, request: RequestView, *, turn: int) -> Decision | None:
    """The replica for this request; None when none is available. turn: counts up with every decision; it breaks ties."""
    num_available = int(np.count_nonzero(snapshot.available))
    if num_available == 0:
        return None
    waits = _estimated_waits(snapshot, request)
    scores = _scores(policy, snapshot, waits)
    lowest = scores[scores.argmin()]
    equal = (scores <= lowest * _TIES[policy]).nonzero()[0]
    slot = int(equal[turn % len(equal)])
    return Decision(slot, int(request.cached_tokens[slot]), float(waits[slot]), policy, num_available)


def explain(policy: PolicyName, snapshot: Snapshot, request: RequestView, *, turn: int) -> list[Row]:
    """Every replica as `choose` with the same arguments sees it."""
    decision = choose(policy, snapshot, request, turn=turn)
    if len(snapshot.available) == 0:
        return []
    waits = _estimated_waits(snapshot, request)
    scores = _scores(policy, snapshot, waits) if decision else np.full(len(waits), np.inf)
    return [
        Row(
            slot=slot,
            available=bool(snapshot.available[slot]),
            num_cached_tokens=int(request.cached_tokens[slot]),
            pending_tokens=float(snapshot.pending_tokens[slot]),
            num_requests=int(snapshot.num_requests[slot]),
            estimated_wait_s=float(waits[slot]),
            score=float(scores[slot]) if np.isfinite(scores[slot]) else None,
            chosen=decision is not None and decision.slot == slot,
        )
        for slot in range(len(waits))
    ]


def _estimated_waits(snapshot: Snapshot, request: RequestView) -> NDArray[np.float64]:
    """Seconds until the first token: every prompt token that waits there, and this prompt's that are not cached."""
    return (snapshot.pending_tokens + (request.num_tokens - request.cached_tokens)) / _speeds(snapshot)


def _scores(policy: PolicyName, snapshot: Snapshot, waits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Lower is better; infinite: not eligible. Where a slot is available, one is finite."""
    if policy == "round_robin":
        return np.where(snapshot.available, 0.0, np.inf)
    if policy == "least_load":
        return np.where(snapshot.available, snapshot.num_requests + 0.5 * snapshot.kv_usage, np.inf)
    occupancy = snapshot.num_requests / snapshot.max_num_seqs
    scores = waits * (
        occupancy + 1.0
    )  # with all its sequences running a replica takes about twice as long for a prompt
    if occupancy[occupancy.argmax()] >= 1.0:
        num_before = np.maximum(snapshot.num_requests - snapshot.max_num_seqs + 1, 0)
        scores += STREAM_S * num_before / snapshot.max_num_seqs
    if snapshot.kv_usage[snapshot.kv_usage.argmax()] > HIGH_KV_USAGE:
        scores += STREAM_S * np.maximum(snapshot.kv_usage - HIGH_KV_USAGE, 0.0)
    mean = float(occupancy.dot(snapshot.available)) / np.count_nonzero(snapshot.available)
    too_many = occupancy > max(MAX_IMBALANCE * mean, FREE_IMBALANCE)
    np.putmask(scores, too_many | ~snapshot.available, np.inf)
    return scores


def _speeds(snapshot: Snapshot) -> NDArray[np.float64] | float:
    """Tokens per second to reckon with: the mean, except for replicas that are surely faster or slower.

    A measured speed depends on the prompts it was measured with, short or long. Taken at its word it would send everything to the
    luckiest replicas, and a replica that began with a few short prompts would never get another one to prove itself: slow is
    believed only while prompts wait there.
    """
    measured = snapshot.tokens_per_s
    num_known = int(np.count_nonzero(measured))
    mean = float(measured.sum()) / num_known if num_known else DEFAULT_TOKENS_PER_S
    slowest, fastest = mean / SPEED_NOISE, mean * SPEED_NOISE
    if measured[measured.argmin()] >= slowest and measured[measured.argmax()] <= fastest:
        return mean
    slow = (measured < slowest) & (measured > 0) & (snapshot.pending_tokens >= PROOF_TOKENS)
    return np.where(slow | (measured > fastest), measured, mean)
