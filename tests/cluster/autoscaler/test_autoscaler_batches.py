"""Replicas for batches: tables, and whole batches on a simulated clock with replicas that take time to start."""

import math
from dataclasses import dataclass, field, replace

import pytest

from cluster.autoscaler.batches import DOWN_AFTER_S, BatchState, size_for_batches
from cluster.autoscaler.decide import decide
from cluster.autoscaler.state import AutoscalerConfig, AutoscalerState, Observation
from cluster.protocol.report import BatchDemand

SPEED = 1_000.0  # tokens/s of one replica
STARTUP_S = 60.0


def demand(tokens: int, deadline_s: float | None = None, most: int | None = None, name: str = "b") -> BatchDemand:
    return BatchDemand(batch_id=name, remaining_tokens=tokens, deadline_s=deadline_s, max_replicas=most)


@pytest.mark.parametrize(
    ("batches", "have", "expected", "what"),
    [
        ([], 5, 0, "nothing to do"),
        ([demand(0, 100.0)], 5, 0, "nothing left to do"),
        ([demand(9_000_000, 10_000.0)], 1, 1, "9,000 s of work in 9,000 s, a tenth of the time being kept in reserve"),
        ([demand(18_000_000, 10_000.0)], 2, 2, "and twice the work"),
        ([demand(1_200_000, 360.0)], 1, 5, "1,200 s of work in 300 s of which another loses 60: 1 + 900 / 240"),
        ([demand(1_200_000, 40.0)], 1, 20, "too late in any case: as fast as possible"),
        ([demand(1_200_000, -9.0)], 1, 20, "the same after the deadline"),
        ([demand(30_000, 40.0)], 2, 2, "no new replica would be ready in time"),
        ([demand(1_200_000, 40.0, 4)], 1, 4, "the maximum of the batch"),
        ([demand(100_000_000)], 1, 20, "no deadline: all replicas"),
        ([demand(100_000_000, None, 3)], 1, 3, "no deadline: the maximum of the batch"),
        ([demand(150_000)], 1, 3, "150 s of work: a fourth would begin when it is done"),
        ([demand(1_000)], 3, 3, "running replicas stay to the end"),
        ([demand(9_000_000, 10_000.0), demand(100_000_000, None, 2, "c")], 1, 2, "the larger need"),
        ([demand(4_500_000, 10_000.0), demand(4_500_000, 10_000.0, None, "c")], 1, 1, "due at the same time: added up"),
        ([demand(9_000_000, 20_000.0), demand(4_500_000, 5_000.0, None, "c")], 1, 1, "one after the other"),
    ],
)
def test_the_number(batches, have, expected, what):
    state = BatchState(num_replicas=have, speed=SPEED)
    _, need = size(batches, state, 0.0, num_ready=have)
    assert need.num_replicas == expected, what


def size(batches, state, now, *, num_ready, total=0):
    return size_for_batches(
        batches, state, now, tokens_total=total, num_ready=num_ready, startup_s=STARTUP_S, max_replicas=20
    )


def test_one_replica_measures_the_speed():
    state, need = size([demand(10**9, 100.0)], BatchState(), 0.0, num_ready=0)
    assert (need.num_replicas, state.speed) == (1, None)
    for second in range(1, 30):
        state, need = size([demand(10**9 - 500 * second, 1e6)], state, float(second), num_ready=1, total=500 * second)
    assert state.speed == pytest.approx(500, rel=0.01)
    assert "a replica does 500 tokens/s" in need.reason


@dataclass
class Cluster:
    """A batch under `decide`, once a second. Replicas are ready `STARTUP_S` after the order and are removed at once."""

    batch: BatchDemand
    min_replicas: int = 0
    speed: float = SPEED
    online: dict = field(default_factory=dict)
    now: float = 0.0
    replica_s: float = 0.0
    numbers: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.config = AutoscalerConfig(min_replicas=self.min_replicas, max_replicas=20)
        self.state = AutoscalerState(num_replicas=self.min_replicas)
        self.ready, self.starting = self.min_replicas, []
        self.left, self.reason = float(self.batch.remaining_tokens), ""

    def run(self, seconds: int) -> None:
        for _ in range(seconds):
            self.now += 1
            self.ready += sum(t <= self.now for t in self.starting)
            self.starting = [t for t in self.starting if t > self.now]
            self.left = max(0.0, self.left - self.ready * self.speed)
            self.replica_s += self.ready + len(self.starting)
            due = None if self.batch.deadline_s is None else self.batch.deadline_s - self.now
            here = replace(self.batch, remaining_tokens=math.ceil(self.left), deadline_s=due)
            seen = Observation(
                num_ready=self.ready,
                num_starting=len(self.starting),
                startup_s=STARTUP_S,
                batches=(here,) if self.left else (),
                batch_tokens_total=int(self.batch.remaining_tokens - self.left),
            )
            self.state, decision = decide(self.config, replace(seen, **self.online), self.state, self.now)
            change = decision.num_replicas - self.ready - len(self.starting)
            self.starting += [self.now + STARTUP_S] * max(0, change)
            for _ in range(-change):
                if self.starting:
                    self.starting.pop()
                else:
                    self.ready -= 1
            if not self.numbers or self.numbers[-1] != decision.num_replicas:
                self.numbers.append(decision.num_replicas)
                self.reason = decision.reason

    def run_to_the_end(self) -> None:
        while self.left and self.now < 100_000:
            self.run(1)


def test_a_deadline_is_met_at_little_more_than_the_minimal_cost():
    cluster = Cluster(demand(30_000_000, 7_200.0))
    cluster.run_to_the_end()
    assert cluster.now < 7_200 - STARTUP_S / 2, "there is no time left to replace a lost replica"
    assert max(cluster.numbers) == 5, "30,000 s of work in 6,480 s, of which the first minutes had one replica only"
    assert cluster.replica_s < 1.1 * 30_000, f"{cluster.replica_s:,.0f} s were paid for 30,000 s of work"
    cluster.run(1)
    peak = cluster.numbers.index(5)
    assert cluster.numbers[peak:] == sorted(cluster.numbers[peak:], reverse=True), (
        "replicas ordered by rounding up are removed later"
    )


def test_from_zero_and_back_to_zero_at_once():
    cluster = Cluster(demand(5_000_000))
    cluster.run_to_the_end()
    assert max(cluster.numbers) > 10
    cluster.run(2)
    assert (cluster.numbers[0], cluster.numbers[-1], cluster.ready) == (1, 0, 0)
    assert cluster.reason == f"{cluster.numbers[-2]} -> 0: no batch is running."


def test_online_needs_stay_when_the_batch_ends():
    busy = {"num_requests": 20, "num_running": 120, "max_num_seqs": 64}
    cluster = Cluster(demand(5_000_000), min_replicas=1, online=busy)
    cluster.run(200)
    assert cluster.state.num_replicas == 3, "120 of 64 sequences each, at a target of 85 %"
    cluster.run_to_the_end()
    cluster.run(2)
    assert cluster.numbers[-1] == 3


def test_to_the_minimum_and_no_further():
    cluster = Cluster(demand(5_000_000, None, 6), min_replicas=2)
    cluster.run_to_the_end()
    cluster.run(2)
    assert (max(cluster.numbers), cluster.numbers[-1]) == (6, 2)


def test_a_speed_that_halves_midway_is_compensated():
    cluster = Cluster(demand(30_000_000, 7_200.0))
    cluster.run(2_000)
    cluster.speed /= 2
    cluster.run_to_the_end()
    assert cluster.now < 7_200
    assert max(cluster.numbers) > 7


def test_idle_replicas_are_removed_only_after_a_while():
    state = BatchState(num_replicas=6, speed=SPEED, seen_at=0.0)
    work = [demand(9_000_000, 5_000.0)]
    for second in range(1, int(DOWN_AFTER_S) + 1):
        batches = [demand(25_000_000, 5_000.0)] if second == 100 else work
        state, need = size(batches, state, float(second), num_ready=6)
        state = replace(state, speed=SPEED)
        assert need.num_replicas == 6, second
    for second in range(int(DOWN_AFTER_S) + 1, int(2 * DOWN_AFTER_S) + 10):
        state, need = size(work, state, float(second), num_ready=6)
        state = replace(state, speed=SPEED)
    assert need.num_replicas == 3, "9,000 s of work in 4,500 s need two, and one more for wrong estimates"


def test_without_batches_the_online_need_decides():
    config = AutoscalerConfig(min_replicas=1, max_replicas=9)
    seen = Observation(num_ready=3, num_backlog_tokens=400_000, prefill_tokens_per_s=SPEED, num_requests=4)
    state, decision = decide(config, seen, AutoscalerState(num_replicas=3), 1.0)
    assert state.batch == BatchState(seen_at=1.0)
    assert state.num_replicas == decision.num_replicas > 3
