"""How many replicas the batches alone need: a pure function of their remaining tokens, their time left and the measured speed.

Knows demands, speeds and the clock as an argument. Knows no online requests; decide.py weighs their needs against this.

With a deadline: enough replicas to finish the tokens due by then in the time left, less a reserve in which a lost replica can be replaced;
a replica ordered now helps only after its start. Without a deadline, or too late for one: as many as allowed, but none that would have
less work than its start takes. The estimates of a batch's tokens may be wrong, but the speed is measured in the same estimates, so the
error cancels out.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from cluster.protocol.report import BatchDemand

MEASURED_S = 300.0  # memory of the mean speed
SPEED_S = 300.0  # a best speed fades over this long: replicas that have just started have answered nothing yet
LEAST_REPLICA_S = 10.0  # replica-seconds of work observed before the speed counts
RESERVE = 0.1  # of the time left, but at least one start-up time
HYSTERESIS = 0.2  # replicas that must be idle in addition to the one removed
DOWN_AFTER_S = 120.0  # for how long they must be idle, while batches run
LEAST_START_S = 10.0


@dataclass(frozen=True, kw_only=True)
class BatchState:
    """What is remembered between two calls."""

    num_replicas: int = 0
    speed: float | None = None  # tokens/s of one replica
    tokens: float = 0.0  # decaying sum of tokens done
    replica_s: float = 0.0  # decaying sum of the replicas' time
    last_total: int = 0
    seen_at: float | None = None
    spare_since: float | None = None
    spare_need: float = 0.0  # the largest since then


@dataclass(frozen=True)
class BatchNeed:
    """`num_replicas` is within the batches' own bounds. `reason`: one clause."""

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
    """Call it about once a second with the state of the call before. tokens_total: of all answered lines; only grows."""
    batches = [b for b in batches if b.remaining_tokens > 0]
    state = _measure(state, bool(batches), tokens_total, num_ready, now)
    if not batches:
        return replace(state, num_replicas=0, spare_since=None), BatchNeed(0, "no batch is running")
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
    """One need for each deadline, for all tokens due by then, and one for the batches without a deadline."""
    if not speed:  # one replica is enough to measure the speed
        return [(1.0, "a batch is running, and its speed is not known yet")]
    needs = []
    for due_s in sorted({b.deadline_s for b in batches if b.deadline_s is not None}):
        due = [b for b in batches if b.deadline_s is not None and b.deadline_s <= due_s]
        tokens = sum(b.remaining_tokens for b in due)
        number = _within(tokens / speed, due_s - max(due_s * RESERVE, startup_s), have, startup_s)
        why = f"{tokens:,} batch tokens are due in {due_s:,.0f} s, and a replica does {speed:,.0f} tokens/s"
        needs.append((_bounded(number, due, most), why))
    if free := [b for b in batches if b.deadline_s is None]:
        tokens = sum(b.remaining_tokens for b in batches)
        number = _bounded(_worthwhile(tokens / speed, have, startup_s), free, most)
        needs.append((number, f"{tokens:,} batch tokens are left, and a replica does {speed:,.0f} tokens/s"))
    return needs


def _within(work_s: float, left_s: float, have: int, startup_s: float) -> float:
    """Replicas for `work_s` of one replica's work. Example: 1,200 s of work, 300 s left, 1 replica, 60 s to start: 1 + 900 / 240 = 4.75."""
    fastest = _worthwhile(work_s, have, startup_s)
    if left_s <= 0:
        return fastest
    if work_s <= have * left_s:
        return work_s / left_s
    if left_s <= startup_s:
        return fastest
    return min(fastest, have + (work_s - have * left_s) / (left_s - startup_s))


def _worthwhile(work_s: float, have: int, startup_s: float) -> float:
    """The most replicas that each have more work than their start takes. Running replicas are kept until the last lines are answered."""
    return max(work_s / startup_s, float(have))


def _bounded(number: float, batches: Sequence[BatchDemand], most: int) -> float:
    """At least one, at most the sum of the batches' maximums."""
    asked = sum(most if b.max_replicas is None else b.max_replicas for b in batches)
    return max(1.0, min(number, asked, most))


def _choose(state: BatchState, need: float, now: float) -> BatchState:
    """Rises at once; falls to the largest need of the last DOWN_AFTER_S."""
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
