"""Memory does not grow with the lines: the benchmark in small, each size in a process of its own whose peak is told apart."""

import importlib

import pytest
from support.paths import ROOT

BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("PYTHONPATH", f"{BENCHMARKS}:{BENCHMARKS.parent}")  # for the processes it starts
    return importlib.import_module("batch_memory")


def test_twenty_thousand_lines(bench, tmp_path):
    """With its answers a line is about 1 KiB, so that 20,000 lines held anywhere would be seen."""
    small, large = (bench.measure_apart(num_lines, tmp_path) for num_lines in (5_000, 20_000))
    assert large["peak"] - small["peak"] < 9, (
        f"MiB: {small['peak']:.1f} for 5,000 lines, {large['peak']:.1f} for 20,000"
    )
    assert list(tmp_path.iterdir()) == []
    rows = bench.table({5_000: small, 20_000: large}).splitlines()
    assert len(rows) == 4
    assert rows[3].startswith("| 20,000 |")
