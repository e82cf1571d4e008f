"""The autoscaling benchmark in small: real traces where there are any, and its own arithmetic everywhere."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from cluster.autoscaler import AutoscalerConfig

ROOT = Path(__file__).resolve().parents[2]
TRACE = ROOT.parent / "shared" / "traces" / "mooncake_synthetic.jsonl"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("autoscaling_benchmark", ROOT / "benchmarks" / "autoscaling.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_short_pauses_are_filled_and_long_ones_are_not(bench):
    schedule = np.array([2, 1, 1, 2, 1, 1, 1, 1, 1, 2])
    assert bench.without_pauses(schedule, 3).tolist() == [2, 2, 2, 2, 1, 1, 1, 1, 1, 2]


def test_undone_counts_only_ups_soon_after_downs(bench):
    assert bench.undone_downs([(0, 1), (10, -1), (20, 1), (100, -1), (900, 2)], 600) == 1


@pytest.mark.skipif(not TRACE.exists(), reason="no request traces beside this checkout")
def test_three_hours_of_tenants_keep_the_objective_and_do_not_flap(bench, monkeypatch):
    monkeypatch.setattr(bench, "DAY_S", 3 * 3600)
    load = bench.Load(bench.A100, *bench.day(bench.read(TRACE), 6))
    outcome = bench.simulate(load, 60, AutoscalerConfig(min_replicas=1, max_replicas=100))
    assert outcome.kept >= 0.99, f"only {outcome.kept:.2%} of the requests met the backlog objective"
    assert outcome.undone <= 3, f"{outcome.undone} scale-downs were undone in three hours"
