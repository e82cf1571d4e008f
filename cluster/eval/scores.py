"""Scores of answers: shares with confidence intervals, and paired comparison with a baseline. Pure arithmetic on given results.

Sources: Wilson, "Probable inference, the law of succession, and statistical inference" (1927), for the interval of a share; McNemar, "Note
on the sampling error of the difference between correlated proportions" (1947), exact form, for whether two models differ; Tango,
"Equivalence test and confidence interval for the difference in proportions for the paired-sample design" (1998) is approximated by
Wald's interval with Bonett and Price's correction (2012), which holds for small samples.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Z = 1.959963984540054  # of 95 %


@dataclass(frozen=True)
class Share:
    """How many of `total` passed. low, high: its 95 % interval."""

    passed: int
    total: int

    @property
    def value(self) -> float:
        return self.passed / self.total if self.total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's. Worked example: 8 of 10 -> 0.49 to 0.94."""
        n = self.total
        if not n:
            return 0.0, 1.0
        share = self.passed / n
        center = (share + Z * Z / (2 * n)) / (1 + Z * Z / n)
        half = Z * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n)) / (1 + Z * Z / n)
        # Rounding must not leave the share outside.
        return min(share, max(0.0, center - half)), max(share, min(1.0, center + half))


@dataclass(frozen=True)
class Mean:
    """Of scores that are neither right nor wrong, or one number for a whole task, such as a perplexity. error: its standard error."""

    value: float
    error: float | None
    total: int
    is_more_better: bool = True

    @property
    def interval(self) -> tuple[float, float] | None:
        """By the normal distribution; None without a standard error."""
        return None if self.error is None else (self.value - Z * self.error, self.value + Z * self.error)


@dataclass(frozen=True)
class Difference:
    """Of two models on the same items. better: items that only the first passed; worse: that only the second did."""

    better: int
    worse: int
    total: int

    @property
    def value(self) -> float:
        return (self.better - self.worse) / self.total if self.total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Bonett and Price's: one item more in each of the two groups."""
        n = self.total + 2
        up, down = (self.better + 1) / n, (self.worse + 1) / n
        half = Z * math.sqrt((up + down - (up - down) ** 2) / n)
        return max(-1.0, up - down - half), min(1.0, up - down + half)

    @property
    def p_value(self) -> float:
        """McNemar's exact test: how likely so uneven a split is where both are equally good. 5 to 0 -> 0.0625."""
        n, k = self.better + self.worse, min(self.better, self.worse)
        if n == 0:
            return 1.0
        return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


@dataclass(frozen=True)
class MeanDifference:
    """Of two models' scores on the same items. better, worse: items on which the first has more, or less."""

    better: int
    worse: int
    total: int
    value: float
    error: float

    @property
    def interval(self) -> tuple[float, float]:
        return self.value - Z * self.error, self.value + Z * self.error

    @property
    def p_value(self) -> float:
        """By the normal distribution: meant for some 30 items and more."""
        return math.erfc(abs(self.value) / self.error / math.sqrt(2)) if self.error else float(not self.value)


def share(results: Sequence[bool]) -> Share:
    return Share(sum(results), len(results))


def compare(first: Mapping[str, bool], second: Mapping[str, bool]) -> Difference:
    """Of the items that both have."""
    common = first.keys() & second.keys()
    return Difference(
        better=sum(first[name] and not second[name] for name in common),
        worse=sum(second[name] and not first[name] for name in common),
        total=len(common),
    )


def mean(scores: Sequence[float], *, is_more_better: bool = True) -> Mean:
    """Worked example: 1, 2 and 3 -> 2, with a standard error of 0.577."""
    return Mean(statistics.fmean(scores), _standard_error(scores), len(scores), is_more_better)


def compare_scores(first: Mapping[str, float], second: Mapping[str, float]) -> MeanDifference:
    """Of the items that both have; at least one."""
    differences = [first[name] - second[name] for name in sorted(first.keys() & second.keys())]
    return MeanDifference(
        better=sum(d > 0 for d in differences),
        worse=sum(d < 0 for d in differences),
        total=len(differences),
        value=statistics.fmean(differences),
        error=_standard_error(differences) or 0.0,
    )


def _standard_error(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
