"""The gateway's metrics again through `ray.util.metrics`, for Ray's own endpoint on every node and the Grafana of its dashboard.

Knows Ray's metrics and samples of Prometheus families; knows no metric by name. `tramontane:num_requests_running` becomes
`ray_tramontane_num_requests_running`. Every sample, of counters and of histogram buckets too, is mirrored as a Gauge of the same name
and labels: rate() and histogram_quantile() read names and labels only, and Ray's Counter and Histogram accept single events only, which
would have to be recorded a second time for every token.
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from ray.util.metrics import Gauge

from cluster.metrics.ranks import rank_families
from workers.rank.reports import RankStats

log = logging.getLogger(__name__)

PUSH_INTERVAL_S = 5.0  # Ray's own reporters read every 10 s
_RANK_METRICS = "tramontane:rank_"
Series = tuple[str, tuple[tuple[str, str], ...]]


class GaugeMirror:
    """Repeats samples as Ray gauges. A series that has ended is set to 0 once: Ray would show its last value forever."""

    def __init__(self, make_gauge: Callable[..., Any] = Gauge) -> None:
        self._make_gauge = make_gauge
        self._gauges: dict[str, Any] = {}
        self._shown: set[Series] = set()

    def show(self, families: Iterable[Metric]) -> None:
        shown: set[Series] = set()
        for family in families:
            for sample in family.samples:
                if not sample.name.endswith("_created"):
                    self._set(sample.name, family.documentation, sample.labels, sample.value)
                    shown.add((sample.name, tuple(sample.labels.items())))
        for name, labels in self._shown - shown:
            self._gauges[name].set(0.0, dict(labels))
        self._shown = shown

    def _set(self, name: str, text: str, labels: Mapping[str, str], value: float) -> None:
        gauge = self._gauges.get(name)
        if gauge is None:
            gauge = self._make_gauge(name.replace(":", "_"), text, tag_keys=tuple(labels))
            self._gauges[name] = gauge
        gauge.set(value, dict(labels))


class RayMetrics:
    """A gateway's registry, without the metrics that ranks publish themselves (see `publish_rank`)."""

    def __init__(self, registry: CollectorRegistry, *, mirror: GaugeMirror | None = None) -> None:
        self._registry = registry
        self._mirror = mirror or GaugeMirror()

    async def push(self) -> None:
        """Samples on this loop, where the router lives, and publishes on a thread."""
        families = [f for f in self._registry.collect() if not f.name.startswith(_RANK_METRICS)]
        await asyncio.to_thread(self._mirror.show, families)


async def publish_forever(registry: CollectorRegistry, interval_s: float = PUSH_INTERVAL_S) -> None:
    """Runs until cancelled. A failed push is logged and retried: metrics never stop a gateway."""
    metrics = RayMetrics(registry)
    while True:
        try:
            await metrics.push()
        except Exception as e:
            log.warning("Metrics could not be pushed to Ray: %s", e)
        await asyncio.sleep(interval_s)


def publish_rank(
    replica_id: str, rank: int, stats: Callable[[], RankStats], interval_s: float = PUSH_INTERVAL_S
) -> None:
    """Called in a rank's actor: publishes its counters until the process ends, on a thread of its own."""
    mirror = GaugeMirror()

    def run() -> None:
        while True:
            with contextlib.suppress(Exception):  # a broken rank is reported elsewhere
                mirror.show(rank_families([(replica_id, rank, stats())]))
            time.sleep(interval_s)

    threading.Thread(target=run, name="rank-metrics", daemon=True).start()
