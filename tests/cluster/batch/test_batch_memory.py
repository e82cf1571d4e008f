"""Memory does not grow with the number of lines: a small run of the benchmark, each size in its own process."""

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
    """A line with its answer takes about 1 KiB, so 20,000 lines kept anywhere would show."""
    small, large = (bench.measure_apart(num_lines, tmp_path) for num_lines in (5_000, 20_000))
    assert large["peak"] - small["peak"] < 9, (
        f"MiB: {small['peak']:.1f} for 5,000 lines, {large['peak']:.1f} for 20,000"
    )
    assert list(tmp_path.iterdir()) == []
    rows = bench.table({5_000: small, 20_000: large}).splitlines()
    assert len(rows) == 4
    assert rows[3].startswith("| 20,000 |")
