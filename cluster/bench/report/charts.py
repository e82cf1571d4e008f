"""Which plots a benchmark has, as numbers: how its times are distributed, and what more load brings. Draws nothing."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cluster.bench.report.results import Results, Row
from cluster.bench.statistics import TIMES, times_of

_MAX_POINTS = 200
_TITLES = {"ttft": "Time to first token", "gap": "Gap between tokens", "e2e": "End to end"}


@dataclass(frozen=True)
class Series:
    """Points of a line, by x."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]


@dataclass(frozen=True)
class Chart:
    """key: for file names. is_log: of the x axis."""

    key: str
    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    is_log: bool = False


def charts(results: Results) -> list[Chart]:
    """Those with at least one line."""
    found = [
        Chart(
            f"{name}_distribution",
            title,
            "ms",
            "% of requests" if name != "gap" else "% of gaps",
            [s for row in results.rows if (s := _distribution(row, name, with_server=len(results.servers) > 1))],
            is_log=True,
        )
        for name, title in _TITLES.items()
    ]
    found += [
        _by_streams(results, "tokens_per_s", "Throughput", "generated tokens/s"),
        _by_streams(results, "ttft_p50", "Time to first token by load", "p50, ms"),
        _by_streams(results, "gap_p50", "Gap by load", "p50, ms"),
    ]
    return [chart for chart in found if any(len(s.xs) > 1 for s in chart.series)]


def _distribution(row: Row, name: str, *, with_server: bool) -> Series | None:
    """The share of values up to x, at most 200 points."""
    ok = [o for load in row.loads for o in load.outcomes if o.failure is None]
    values = np.sort(np.asarray(times_of(ok)[TIMES.index(name)])) * 1e3
    # Events in one piece have no gap between them; a logarithm has no place for 0.
    values = np.maximum(values, 0.1)
    if len(values) < 2:
        return None
    shares = np.linspace(0, 100, min(_MAX_POINTS, len(values)))
    xs = [float(x) for x in np.percentile(values, shares)]
    label = f"{row.label}, {row.server.name}" if with_server else row.label
    return Series(label, xs, [float(s) for s in shares])


def _by_streams(results: Results, metric: str, title: str, label: str) -> Chart:
    """One line for each server, over the levels of a closed loop."""
    lines = []
    for s, server in enumerate(results.servers):
        points = []
        for row in results.rows:
            num_streams = results.plan.levels[row.level].num_streams
            if row.server_index == s and num_streams is not None and metric in row.metrics:
                points.append((float(num_streams), row.metrics[metric].median))
        points.sort()
        lines.append(Series(server.name, [x for x, _ in points], [y for _, y in points]))
    return Chart(f"{metric}_by_streams", title, "streams", label, lines)
