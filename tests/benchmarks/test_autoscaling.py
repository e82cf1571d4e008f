"""A small version of the autoscaling benchmark: real traces where available, and its own arithmetic everywhere."""

import importlib
import sys

import numpy as np
import pytest
from support.paths import ROOT

from cluster.autoscaler.state import AutoscalerConfig

TRACE = ROOT.parent / "shared" / "traces" / "mooncake_synthetic.jsonl"


@pytest.fixture(autouse=True)
def _benchmarks_are_importable(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.fixture
def bench():
    yield importlib.import_module("autoscaling")
    del sys.modules["autoscaling"]


@pytest.fixture
def oracle():
    return importlib.import_module("simulation.oracle")


def steady(rate_by_slot: list[float]):
    """A load of requests of 1,000 tokens, one output token each, on replicas that compute 1,000 tokens/s."""
    from simulation.fluid import Load, Model

    per_second = np.repeat(rate_by_slot, 30)
    times = np.concatenate([t + np.arange(int(n)) / max(1, n) for t, n in enumerate(per_second)])
    model = Model("test", 1_000, 1_000, 10_000_000, 0.01, slowdown=0.0)
    return Load(model, (times, np.full(len(times), 1_000), np.ones(len(times))), len(per_second))


def test_the_oracle_starts_replicas_ahead_of_a_rise_and_keeps_no_more_than_the_load_needs(oracle):
    load = steady([1] * 20 + [3] * 20 + [1] * 20)
    (hours,) = oracle.cheapest(load, 1.0, startup_s=60, goals=[(300.0, 0.99)])
    assert hours * 3600 == (20 * 1 + 20 * 3 + 20 * 1) * 30 + 2 * 60


def test_an_oracle_that_must_not_flap_keeps_replicas_through_a_short_lull(oracle):
    load = steady([2] * 20 + [1] * 5 + [2] * 20)
    calm, free = oracle.cheapest(load, 1.0, startup_s=30, goals=[(600.0, 0.99), (0.0, 0.99)])
    assert calm * 3600 == 45 * 2 * 30, "a lull of 150 s is shorter than 600 s"
    assert free * 3600 == (40 * 2 + 5) * 30 + 30, "one start is cheaper than 150 idle seconds"


def test_a_started_replica_runs_for_at_least_the_shortest_life(oracle):
    saved = np.zeros((20, 1))
    saved[10] = 100.0
    numbers = oracle.plan(saved, 30.0, 150.0)[-1]
    assert numbers.sum() - 20 == 5, f"one busy slot of 30 s costs the minimum of 150 s, not {numbers.tolist()}"


def test_convex_is_the_lower_convex_hull(oracle):
    assert oracle.convex(np.array([9.0, 9.0, 3.0, 3.0, 0.0])).tolist() == [9.0, 6.0, 3.0, 1.5, 0.0]


def test_undone_counts_only_ups_soon_after_downs(bench):
    assert bench.undone_downs([(0, 1), (10, -1), (20, 1), (100, -1), (900, 2)], 600) == 1


@pytest.mark.skipif(not TRACE.exists(), reason="no request traces next to this checkout")
def test_half_a_day_of_tenants_keeps_the_objective_without_flapping(bench, monkeypatch):
    monkeypatch.setattr(bench, "DAY_S", 12 * 3600)
    load = bench.Load(bench.A100, *bench.day(bench.read(TRACE), 6))
    outcome = bench.simulate(load, 60, AutoscalerConfig(min_replicas=1, max_replicas=100))
    assert outcome.kept >= bench.KEPT, f"only {outcome.kept:.2%} of the requests met the backlog objective"
    assert outcome.undone <= 10, f"{outcome.undone} scale-downs were undone in twelve hours"
