"""How many replicas the batches alone would have: a pure function of their remaining tokens, their time left and the measured speed.

Knows demands, speeds and the clock as an argument; nothing of online requests, whose needs decide.py weighs against this.

With a deadline: so many that the tokens due by then are done within the time left, less a reserve in which a lost replica can be
replaced; what is ordered now helps only after its start. Without one, or too late for it: as many as are allowed, but none that
would have less to do than its start takes. A batch's own estimate of its tokens may be wrong: since the speed is measured in the
same estimates, that cancels out.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from cluster.protocol.report import BatchDemand

MEASURED_S = 300.0  # how long the speed's average remembers
SPEED_S = 300.0  # a best speed fades over this long: replicas that just began have answered nothing yet
LEAST_REPLICA_S = 10.0  # of work seen before its speed counts
RESERVE = 0.1  # of the time left, and at least a start
HYSTERESIS = 0.2  # replicas that must be needless beyond the one given up
DOWN_AFTER_S = 120.0  # for how long, while batches run
LEAST_START_S = 10.0


@dataclass(frozen=True, kw_only=True)
class BatchState:
    """What is remembered between two looks."""

    num_replicas: int = 0
    speed: float | None = None  # tokens/s of one replica
    tokens: float = 0.0  # decaying sums, of what was done
    replica_s: float = 0.0  # and of the replicas' time
    last_total: int = 0
    seen_at: float | None = None
    spare_since: float | None = None
    spare_need: float = 0.0  # the largest since then


@dataclass(frozen=True)
class BatchNeed:
    """`num_replicas`: whole, within the batches' own bounds. `reason`: a clause."""

    num_replicas: int
    reason: str


def size_for_batches(
    batches: Sequence[BatchDemand],
    state: BatchState,
    now: float,
    *,
    tokens_total: int,
    num_ready: int,
    startup_s: float,
    max_replicas: int,
) -> tuple[BatchState, BatchNeed]:
    """Call it about once a second with the state of the call before. tokens_total: of lines answered so far, only grows."""
    batches = [b for b in batches if b.remaining_tokens > 0]
    state = _measure(state, bool(batches), tokens_total, num_ready, now)
    if not batches:
        return replace(state, num_replicas=0, spare_since=None), BatchNeed(0, "no batch runs")
    have = min(state.num_replicas, max_replicas)
    need, reason = max(_needs(batches, state.speed, have, max(startup_s, LEAST_START_S), max_replicas))
    state = _choose(replace(state, num_replicas=have), need, now)
    return state, BatchNeed(state.num_replicas, reason)


def _measure(state: BatchState, works: bool, total: int, num_ready: int, now: float) -> BatchState:
    elapsed = 0.0 if state.seen_at is None else max(0.0, now - state.seen_at)
    done = 0 if state.seen_at is None else max(0, total - state.last_total)
    state = replace(state, last_total=total, seen_at=now)
    if not works or not num_ready:
        return state
    kept = math.exp(-elapsed / MEASURED_S)
    state = replace(state, tokens=kept * state.tokens + done, replica_s=kept * state.replica_s + elapsed * num_ready)
    if not state.tokens or state.replica_s < LEAST_REPLICA_S:
        return state
    return replace(
        state, speed=max(state.tokens / state.replica_s, (state.speed or 0.0) * math.exp(-elapsed / SPEED_S))
    )


def _needs(
    batches: Sequence[BatchDemand], speed: float | None, have: int, startup_s: float, most: int
) -> list[tuple[float, str]]:
    """One for each deadline, of all that is due by then; and one for what has none."""
    if not speed:  # one replica shows how fast it is
        return [(1.0, "a batch runs, and its speed is not known yet")]
    needs = []
    for due_s in sorted({b.deadline_s for b in batches if b.deadline_s is not None}):
        due = [b for b in batches if b.deadline_s is not None and b.deadline_s <= due_s]
        tokens = sum(b.remaining_tokens for b in due)
        number = _within(tokens / speed, due_s - max(due_s * RESERVE, startup_s), have, startup_s)
        why = f"{tokens:,} batch tokens are due in {due_s:,.0f} s, and a replica does {speed:,.0f} a second"
        needs.append((_bounded(number, due, most), why))
    if free := [b for b in batches if b.deadline_s is None]:
        tokens = sum(b.remaining_tokens for b in batches)
        number = _bounded(_worthwhile(tokens / speed, have, startup_s), free, most)
        needs.append((number, f"{tokens:,} batch tokens are left, and a replica does {speed:,.0f} a second"))
    return needs


def _within(work_s: float, left_s: float, have: int, startup_s: float) -> float:
    """Replicas for that much work of one. Example: 1,200 s of work, 300 s left, 1 there, 60 s to start: 1 + 900 / 240 = 4.75."""
    fastest = _worthwhile(work_s, have, startup_s)
    if left_s <= 0:
        return fastest
    if work_s <= have * left_s:
        return work_s / left_s
    if left_s <= startup_s:
        return fastest
    return min(fastest, have + (work_s - have * left_s) / (left_s - startup_s))


def _worthwhile(work_s: float, have: int, startup_s: float) -> float:
    """The most of which each has more to do than its start takes. What runs already is kept: it is idle only when the last lines are."""
    return max(work_s / startup_s, float(have))


def _bounded(number: float, batches: Sequence[BatchDemand], most: int) -> float:
    """At least one, at most what they ask for together."""
    asked = sum(most if b.max_replicas is None else b.max_replicas for b in batches)
    return max(1.0, min(number, asked, most))


def _choose(state: BatchState, need: float, now: float) -> BatchState:
    """Up at once, down to the largest need of a while."""
    number = state.num_replicas
    up = math.ceil(need - HYSTERESIS) if number else math.ceil(need)
    if up > number:
        return replace(state, num_replicas=up, spare_since=None)
    if need + HYSTERESIS > number - 1:
        return replace(state, spare_since=None)
    if state.spare_since is None:
        return replace(state, spare_since=now, spare_need=need)
    largest = max(state.spare_need, need)
    if now - state.spare_since < DOWN_AFTER_S:
        return replace(state, spare_need=largest)
    return replace(state, num_replicas=math.ceil(largest + HYSTERESIS), spare_since=None)
