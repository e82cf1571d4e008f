"""The decisions of the autoscaler. It is a pure function, so every test is a table or a loop over a simulated clock."""

import math
import random
from dataclasses import replace
from itertools import pairwise

import pytest

from cluster.autoscaler.decide import EXCEEDED_SHARE, MAX_NEEDS, decide, with_reserve
from cluster.autoscaler.state import AutoscalerConfig, AutoscalerState, Observation

SPEED = 1_000.0  # prompt tokens/s of one replica
CONFIG = AutoscalerConfig(min_replicas=1, max_replicas=40, scale_down_after_s=300.0)


class Clock:
    """Calls `decide` once a simulated second. Ordered replicas are ready at once unless a test says otherwise."""

    def __init__(self, config: AutoscalerConfig = CONFIG, num_replicas: int = 1) -> None:
        self.config = config
        self.state = AutoscalerState(num_replicas=num_replicas, speed=SPEED)
        self.now = 0.0
        self.arrived = 0.0
        self.numbers: list[int] = []
        self.reason = ""

    def run(self, seconds: int, rate: float = 0.0, **seen: object) -> int:
        for _ in range(seconds):
            self.now += 1
            self.arrived += rate
            number = self.state.num_replicas
            observation = Observation(num_ready=number, arrived_tokens_total=int(self.arrived), startup_s=30.0)
            self.state, decision = decide(self.config, replace(observation, **seen), self.state, self.now)  # type: ignore[arg-type]
            if decision.num_replicas != number or not self.numbers:
                self.numbers.append(decision.num_replicas)
                self.reason = decision.reason
        return self.state.num_replicas

    def turns(self) -> int:
        ups = [after > before for before, after in pairwise(self.numbers)]
        return sum(a != b for a, b in pairwise(ups))


def test_a_backlog_above_its_objective_scales_up_at_once():
    clock = Clock(num_replicas=2)
    clock.run(60, rate=1_500)
    before = clock.state.num_replicas
    number = clock.run(1, rate=1_500, num_ready=2, num_backlog_tokens=120_000)
    assert number >= before + 2, f"60 s of work on 2 replicas moved the number from {before} to {number} only"
    assert clock.reason == f"{before} -> {number}: backlog of 60.0 s is above the objective of 1.0 s."


def test_a_backlog_within_the_objective_orders_nothing():
    assert Clock(num_replicas=2).run(1, num_backlog_tokens=1_900) == 2


def test_starting_replicas_are_not_ordered_again():
    clock = Clock(num_replicas=2)
    first = clock.run(1, num_ready=2, num_backlog_tokens=240_000)
    assert first == 8, "240 s of work over a start-up of 30 s is 8 replicas"
    assert clock.run(20, num_ready=2, num_starting=first - 2, num_backlog_tokens=200_000) == first


def test_growing_arrivals_scale_up_before_there_is_a_backlog():
    clock = Clock()
    for second in range(900):
        clock.run(1, rate=10.0 * second)
    assert clock.state.num_replicas >= 9, "9,000 tokens/s need 9 replicas of 1,000"
    assert "prompt tokens/s expected" in clock.reason


@pytest.mark.parametrize(
    ("seen", "expected", "what"),
    [
        ({"num_running": 128, "max_num_seqs": 64}, 3, "all sequences of both replicas are in use"),
        ({"kv_cache_usage": 1.0}, 3, "the KV caches of both are full"),
        ({"num_running": 64, "max_num_seqs": 64, "kv_cache_usage": 0.5}, 2, "half the capacity is free"),
    ],
)
def test_decode_load_counts(seen, expected, what):
    assert Clock(num_replicas=2).run(120, num_requests=1, num_ready=2, **seen) == expected, what


def test_missed_ttft_orders_one_more_only_while_work_waits():
    late = {"num_requests": 5, "ttft_p95_s": 3.0, "num_ready": 2}
    assert Clock(num_replicas=2).run(5, **late) == 2, "another replica does not help a long prompt on an idle one"
    clock = Clock(num_replicas=2)
    assert clock.run(5, **late, num_backlog_tokens=1_500) == 3
    assert "TTFT p95 of 3.0 s" in clock.reason


@pytest.mark.parametrize(("begin", "backlog", "expected"), [(2, 10_000_000, 5), (1, 0, 2), (9, 0, 5), (0, 0, 2)])
def test_the_number_never_leaves_the_bounds(begin, backlog, expected):
    clock = Clock(AutoscalerConfig(min_replicas=2, max_replicas=5), num_replicas=begin)
    assert clock.run(1, num_requests=1, num_backlog_tokens=backlog) == expected


def test_to_zero_after_a_whole_window_without_requests():
    clock = Clock(replace(CONFIG, min_replicas=0), num_replicas=1)
    clock.run(10, num_requests=1)
    assert clock.run(299) == 1, "the last request was less than 300 s ago"
    assert clock.run(20) == 0
    assert clock.reason == "1 -> 0: no request arrived in the last 300 s."


def test_to_zero_after_load_and_it_stays_there():
    clock = Clock(replace(CONFIG, min_replicas=0), num_replicas=1)
    assert clock.run(600, rate=5_000) > 5
    assert clock.run(301) == 0, "fading averages must not keep a replica"
    assert clock.run(1_000) == 0, "or start one"


@pytest.mark.parametrize("speed", [None, SPEED])
def test_from_zero_at_once_on_any_request(speed):
    clock = Clock(replace(CONFIG, min_replicas=0), num_replicas=0)
    clock.state = replace(clock.state, speed=speed)
    clock.run(400)
    assert clock.state.num_replicas == 0
    assert clock.run(1, num_requests=1, num_backlog_tokens=10) == 1
    assert clock.reason.startswith("0 -> 1: ")


def test_a_stream_without_new_arrivals_keeps_its_replica():
    clock = Clock(replace(CONFIG, min_replicas=0), num_replicas=1)
    assert clock.run(1_000, num_requests=1, num_running=1, max_num_seqs=64) == 1


def test_only_a_lull_longer_than_the_window_scales_down():
    clock = Clock(num_replicas=1)
    busy = clock.run(900, rate=8_000)
    assert busy >= 9
    assert clock.run(240, rate=500) == busy
    assert clock.run(3_600, rate=500) <= 2
    assert "were needed in the last 300 s" in clock.reason


@pytest.mark.parametrize("seed", range(6))
def test_noise_causes_no_flapping(seed):
    rng = random.Random(seed)
    clock = Clock(num_replicas=12)
    rate = rng.uniform(5_000, 15_000)
    clock.run(600, rate=rate)
    clock.numbers = [clock.state.num_replicas]
    for _ in range(1_800):
        clock.run(1, rate=rate * rng.lognormvariate(0, 0.5))
    assert clock.turns() <= 2, f"{clock.numbers} within half an hour of steady noise"


def test_prefix_hits_cost_no_work():
    cold, warm = Clock(), Clock()
    cold.run(600, rate=8_000)
    warm.run(600, rate=8_000, prompt_hit_rate=0.75)
    assert warm.state.num_replicas < cold.state.num_replicas / 2


def test_a_dropped_gateway_causes_no_jump_and_the_state_stays_bounded():
    clock = Clock()
    clock.run(2_000, rate=500)
    clock.arrived = 0.0
    assert clock.run(60, rate=500) == 1
    assert len(clock.state.needs) <= MAX_NEEDS + 1


def test_the_reserve_follows_the_variance():
    c = math.log(1 / EXCEEDED_SHARE) * 24.0 / 2
    number = with_reserve(20.0, 24.0, 1.0)
    assert number * (number - 20.0) == pytest.approx(c), "exceeded with exp(-2 n (n - 20) / 24) = EXCEEDED_SHARE"
    assert with_reserve(20.0, 0.0, 1.0) == 20.0


def test_the_reserve_covers_rises_that_forecasts_miss():
    """Regular steps longer than a start-up: the same mean and no noise, but no forecast predicts them."""
    steady, stepping = Clock(num_replicas=12), Clock(num_replicas=12)
    for step in range(40):
        steady.run(180, rate=10_000)
        stepping.run(180, rate=8_000 if step % 2 else 12_000)
    assert steady.state.num_replicas == 11
    stepping.run(120, rate=8_000)
    assert stepping.state.missed > 500**2, "forecasts fell short by 4,000 tokens/s again and again"
    assert stepping.state.num_replicas >= 14, "a lull must keep room for the next 12,000 tokens/s"


def test_the_reserve_for_one_rise_fades():
    clock = Clock()
    clock.run(600, rate=1_000)
    after = [clock.run(3_600, rate=8_000) for _ in range(3)]
    assert after[0] <= 11, "an hour after one step of 7,000 tokens/s, at most two replicas more than usual remain"
    assert after[2] == 9, f"three hours of steady load leave only the usual reserve: {after}"


def test_white_noise_does_not_count_as_missed_forecasts():
    rng = random.Random(1)
    clock = Clock(num_replicas=12)
    for _ in range(3_600):
        clock.run(1, rate=10_000 * rng.expovariate(1.0))
    assert clock.state.missed < (0.05 * 10_000) ** 2, "noise has its own reserve and must not count twice"
