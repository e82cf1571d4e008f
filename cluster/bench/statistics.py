"""From outcomes to numbers: percentiles, rates, goodput and price of one run; medians and ranges over rounds; ratios of two servers.

Knows numbers only; where they came from and how they are shown is known elsewhere. Names of metrics: METRICS.
"""

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from cluster.bench.exchange import Outcome
from cluster.bench.load import Loaded
from cluster.bench.objective import Objective

PERCENTILES = (50, 90, 99)
TIMES = ("ttft", "gap", "mean_gap", "e2e")


class Metric(NamedTuple):
    title: str
    unit: str
    is_more_better: bool


METRICS: dict[str, Metric] = {
    **{f"ttft_p{p}": Metric(f"time to first token p{p}", "ms", False) for p in PERCENTILES},
    **{f"gap_p{p}": Metric(f"gap between tokens p{p}", "ms", False) for p in PERCENTILES},
    **{f"mean_gap_p{p}": Metric(f"time per token after the first p{p}", "ms", False) for p in PERCENTILES},
    **{f"e2e_p{p}": Metric(f"end to end p{p}", "ms", False) for p in PERCENTILES},
    "tokens_per_s": Metric("generated tokens/s", "tokens/s", True),
    "total_tokens_per_s": Metric("tokens/s with prompts", "tokens/s", True),
    "requests_per_s": Metric("requests/s", "requests/s", True),
    "goodput": Metric("goodput", "requests/s", True),
    "met": Metric("requests that meet the objective", "%", True),
    "usd_per_million": Metric("price of a million generated tokens", "USD", False),
}


@dataclass(frozen=True)
class Problem:
    """Failures of one kind. message: the first one's. max_retry_after_s: the longest that the server named."""

    num: int
    message: str
    max_retry_after_s: float | None


@dataclass(frozen=True)
class Summary:
    """One run. metrics: name -> value, without those that cannot be known. Times in ms. num_joined: events that came in one
    piece with the event before them, so that the gap between them is 0.
    """

    num_ok: int
    num_cut: int
    num_left: int
    duration_s: float
    metrics: Mapping[str, float]
    problems: Mapping[str, Problem]
    num_prompt_tokens: int
    num_output_tokens: int
    num_events: int
    num_joined: int
    num_short: int
    num_without_usage: int
    sent_late_p99_ms: float
    cpu_share: float
    loop_late_p99_ms: float

    @property
    def num_failed(self) -> int:
        return sum(p.num for p in self.problems.values())


def summarize(loaded: Loaded, *, objective: Objective | None, price_per_hour: float | None) -> Summary:
    ok = [o for o in loaded.outcomes if o.failure is None]
    duration_s = loaded.ended_s - loaded.began_s
    num_prompt, num_output = sum(o.num_prompt for o in ok), sum(o.num_output for o in ok)
    metrics: dict[str, float] = {}
    for name, values in zip(TIMES, times_of(ok), strict=True):
        metrics |= percentiles_ms(name, values)
    if ok and duration_s > 0:
        metrics["tokens_per_s"] = num_output / duration_s
        if num_prompt:
            metrics["total_tokens_per_s"] = (num_prompt + num_output) / duration_s
        metrics["requests_per_s"] = len(ok) / duration_s
    if objective is not None and loaded.outcomes and duration_s > 0:
        num_met = sum(objective.is_met(judged_times(o)) for o in ok)
        metrics["goodput"] = num_met / duration_s
        metrics["met"] = 100 * num_met / len(loaded.outcomes)
    if price_per_hour is not None and num_output and duration_s > 0:
        metrics["usd_per_million"] = price_per_hour * duration_s / 3600 / num_output * 1e6
    return Summary(
        num_ok=len(ok),
        num_cut=loaded.num_cut,
        num_left=loaded.num_left,
        duration_s=duration_s,
        metrics=metrics,
        problems=problems_of(loaded.outcomes),
        num_prompt_tokens=num_prompt,
        num_output_tokens=num_output,
        num_events=sum(len(o.times_s) for o in ok),
        num_joined=sum(gap == 0 for o in ok for gap in o.gaps_s),
        num_short=sum(o.num_output < o.wanted_output for o in ok),
        num_without_usage=sum(not o.has_usage for o in ok),
        sent_late_p99_ms=_percentile([(o.sent_s - o.asked_s) * 1e3 for o in loaded.outcomes], 99),
        cpu_share=loaded.cost.cpu_share,
        loop_late_p99_ms=loaded.cost.late_p99_s * 1e3,
    )


def times_of(ok: Sequence[Outcome]) -> tuple[list[float], list[float], list[float], list[float]]:
    """Seconds of whole answers, in the order of TIMES; the gaps of all of them together."""
    return (
        [o.ttft_s for o in ok],
        [gap for o in ok for gap in o.gaps_s],
        [gap for o in ok if (gap := o.mean_gap_s) is not None],
        [o.e2e_s for o in ok],
    )


def judged_times(outcome: Outcome) -> dict[str, float | None]:
    """What an objective may limit, of a whole answer."""
    return {
        "ttft": outcome.ttft_s,
        "gap": outcome.mean_gap_s,
        "max_gap": max(outcome.gaps_s, default=None),
        "e2e": outcome.e2e_s,
    }


def percentiles_ms(name: str, values_s: Sequence[float]) -> dict[str, float]:
    if not values_s:
        return {}
    found = np.percentile(np.asarray(values_s) * 1e3, PERCENTILES)
    return {f"{name}_p{p}": float(v) for p, v in zip(PERCENTILES, found, strict=True)}


def problems_of(outcomes: Iterable[Outcome]) -> dict[str, Problem]:
    """By kind, the most frequent first."""
    failures = [o.failure for o in outcomes if o.failure is not None]
    problems = {}
    for kind, num in Counter(f.kind for f in failures).most_common():
        same = [f for f in failures if f.kind == kind]
        waits = [f.retry_after_s for f in same if f.retry_after_s is not None]
        problems[kind] = Problem(num, same[0].message, max(waits, default=None))
    return problems


@dataclass(frozen=True)
class Spread:
    """Of one metric over rounds, or of one ratio."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(statistics.median(values), min(values), max(values))


def over_rounds(summaries: Sequence[Summary]) -> dict[str, Spread]:
    """Every metric that at least one round has."""
    values = {name: [s.metrics[name] for s in summaries if name in s.metrics] for name in METRICS}
    return {name: Spread.of(found) for name, found in values.items() if found}


def ratios(first: Sequence[Summary], second: Sequence[Summary]) -> dict[str, Spread]:
    """Second server to first, of each round; both lists have the same rounds. A metric that a round of either lacks, or has as 0, is left
    out of that round."""
    found: dict[str, list[float]] = {}
    for a, b in zip(first, second, strict=True):
        for name in METRICS:
            if a.metrics.get(name) and name in b.metrics:
                found.setdefault(name, []).append(b.metrics[name] / a.metrics[name])
    return {name: Spread.of(values) for name, values in found.items()}


def _percentile(values: Sequence[float], percent: float) -> float:
    return float(np.percentile(values, percent)) if values else 0.0
