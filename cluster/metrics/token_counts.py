"""The two metrics that every token of every stream changes: how many there are, and how much time lies between them.

Plain numbers of one event loop, which become samples when somebody asks. The library's own histogram takes two locks and looks at its
bounds one after the other, which was 4 % of what a token costs the gateway. Knows no sequence.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString


class TokenCounts(Collector):
    """Of one served model. bounds: of the buckets, in seconds, without the last one, which has no bound."""

    def __init__(self, *, model_name: str, prefix: str, bounds: Sequence[float]) -> None:
        self._model_name = model_name
        self._prefix = prefix
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)  # of gaps; a bucket contains its bound
        self._sum_s = 0.0
        self.num_tokens = 0

    def add_gap(self, gap_s: float) -> None:
        """Two tokens of a sequence came this far apart."""
        self._counts[bisect_left(self._bounds, gap_s)] += 1
        self._sum_s += gap_s

    def collect(self) -> Iterator[Metric]:
        tokens = CounterMetricFamily(
            f"{self._prefix}generation_tokens", "Generated tokens of all sequences.", labels=["model_name"]
        )
        tokens.add_metric([self._model_name], self.num_tokens)
        yield tokens
        gaps = HistogramMetricFamily(
            f"{self._prefix}inter_token_latency_seconds",
            "Seconds between two tokens of a sequence.",
            labels=["model_name"],
        )
        names = [floatToGoString(bound) for bound in (*self._bounds, float("inf"))]
        buckets = list(zip(names, accumulate(self._counts), strict=True))
        gaps.add_metric([self._model_name], buckets, self._sum_s)
        yield gaps
