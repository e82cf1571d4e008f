"""Chooses the replica for a request: pure functions of numbers about the replicas, vectorized over them.

Knows numbers by slot only; replicas, streams and the clock stay in table.py, cached blocks in prefix_index.py.

The default, `prefix`, predicts the time to the first token on every replica: the prompt tokens that wait there plus the part of this
prompt that its cache does not hold, at its speed; running sequences slow that down. So a cached prefix counts for the seconds it saves
and no more, and a popular prefix spreads as soon as its holder's queue is longer than computing the prefix again would take. A replica
that holds far more sequences than its share is never chosen (consistent hashing with bounded loads), because many short prompts with
long outputs fill a replica without showing in its prompt queue.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cluster.protocol.routing import RoutingPolicy

STREAM_S = 10.0  # rough lifetime of a stream: a full replica frees max_num_seqs sequences in this time
HIGH_KV_USAGE = 0.9  # above this, a new prompt soon preempts another
MAX_IMBALANCE = 1.5  # times the mean occupancy: the most a replica may have, once occupancy matters
FREE_IMBALANCE = 0.25  # of max_num_seqs: below this, an uneven load does not matter
_TIES = {"prefix": 1.01, "least_load": 1.0, "round_robin": 1.0}  # predictions within 1 % are equal
SPEED_NOISE = 1.5  # speeds that differ by less than this factor may come from equal machines
PROOF_TOKENS = 1024  # prompt tokens that must wait on a slow replica before its speed counts
DEFAULT_TOKENS_PER_S = 4000.0  # until a replica has computed a prompt


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The replicas by slot; all arrays have the shape [num_slots]. Slots without a replica are not available."""

    available: NDArray[np.bool_]
    num_requests: NDArray[np.int64]  # the larger of what the gateway sent and what the replica reports
    pending_tokens: NDArray[np.float64]  # prompt tokens still to compute, including those no report knows yet
    tokens_per_s: NDArray[np.float64]  # prefill speed; 0 where unknown
    kv_usage: NDArray[np.float64]  # 0 to 1
    max_num_seqs: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class RequestView:
    """What a policy knows about a request. `cached_tokens`, by slot: PrefixIndex.match times the block size."""

    num_tokens: int  # prompt and output so far: what a replica must have computed before the next token
    cached_tokens: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Decision:
    """`estimated_wait_s`: until the first token, as far as prompts determine it."""

    slot: int
    num_cached_tokens: int
    estimated_wait_s: float
    policy: RoutingPolicy
    num_available: int

    @property
    def reason(self) -> str:
        """One clause for logs and display."""
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


def choose(policy: RoutingPolicy, snapshot: Snapshot, request: RequestView, *, turn: int) -> Decision | None:
    """The replica for this request; None if none is available. turn: grows by 1 with every decision; it breaks ties."""
    num_available = int(np.count_nonzero(snapshot.available))
    if num_available == 0:
        return None
    waits = _estimated_waits(snapshot, request)
    scores = _scores(policy, snapshot, waits)
    lowest = scores[scores.argmin()]
    equal = (scores <= lowest * _TIES[policy]).nonzero()[0]
    slot = int(equal[turn % len(equal)])
    return Decision(slot, int(request.cached_tokens[slot]), float(waits[slot]), policy, num_available)


def explain(policy: RoutingPolicy, snapshot: Snapshot, request: RequestView, *, turn: int) -> list[Row]:
    """Every replica as `choose` sees it with the same arguments."""
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
    """Seconds until the first token: all prompt tokens that wait there, and those of this prompt that are not cached."""
    return (snapshot.pending_tokens + (request.num_tokens - request.cached_tokens)) / _speeds(snapshot)


def _scores(policy: RoutingPolicy, snapshot: Snapshot, waits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Lower is better; infinite: not eligible. If a slot is available, at least one score is finite."""
    if policy == "round_robin":
        return np.where(snapshot.available, 0.0, np.inf)
    if policy == "least_load":
        return np.where(snapshot.available, snapshot.num_requests + 0.5 * snapshot.kv_usage, np.inf)
    occupancy = snapshot.num_requests / snapshot.max_num_seqs
    scores = waits * (occupancy + 1.0)  # a full replica takes about twice as long for a prompt
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
    """Tokens per second to assume: the mean, except for replicas that are certainly faster or slower.

    A measured speed depends on the length of the prompts it was measured with. Trusting it would send everything to the luckiest
    replicas, and a replica that started with a few short prompts would never get another one. So a low speed counts only while prompts
    wait there.
    """
    measured = snapshot.tokens_per_s
    num_known = int(np.count_nonzero(measured))
    mean = float(measured.sum()) / num_known if num_known else DEFAULT_TOKENS_PER_S
    slowest, fastest = mean / SPEED_NOISE, mean * SPEED_NOISE
    if measured[measured.argmin()] >= slowest and measured[measured.argmax()] <= fastest:
        return mean
    slow = (measured < slowest) & (measured > 0) & (snapshot.pending_tokens >= PROOF_TOKENS)
    return np.where(slow | (measured > fastest), measured, mean)
