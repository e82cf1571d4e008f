"""The same metrics through `ray.util.metrics`, for Ray's own endpoint on every node and the Grafana beside its dashboard.

Knows Ray's metrics and samples of Prometheus families; knows no metric by name. `tramontane:num_requests_running` becomes
`ray_tramontane_num_requests_running`. Every sample, of counters and of histogram buckets too, is mirrored as a Gauge of the same name
and labels: rate() and histogram_quantile() read names and labels only, and Ray's Counter and Histogram take single events, which would
have to be recorded a second time for every token.
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
from cluster.protocol.view import RankStats

log = logging.getLogger(__name__)

PUSH_INTERVAL_S = 5.0  # Ray's own reporters read every 10 s
_SAID_BY_RANKS = "tramontane:rank_"
Series = tuple[str, tuple[tuple[str, str], ...]]


class GaugeMirror:
    """Repeats samples as Ray gauges. A series that is gone becomes 0 once: Ray would show its last value for ever."""

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
    """A gateway's registry. What ranks say of themselves (see `publish_rank`) is left to them."""

    def __init__(self, registry: CollectorRegistry, *, mirror: GaugeMirror | None = None) -> None:
        self._registry = registry
        self._mirror = mirror or GaugeMirror()

    async def push(self) -> None:
        """Samples on this loop, where the router lives, and hands over on a thread."""
        families = [f for f in self._registry.collect() if not f.name.startswith(_SAID_BY_RANKS)]
        await asyncio.to_thread(self._mirror.show, families)


async def publish_forever(registry: CollectorRegistry, interval_s: float = PUSH_INTERVAL_S) -> None:
    """Runs until cancelled. A push that fails is logged and tried again: metrics never stop a gateway."""
    metrics = RayMetrics(registry)
    while True:
        try:
            await metrics.push()
        except Exception as e:
            log.warning("Metrics could not be handed to Ray: %s", e)
        await asyncio.sleep(interval_s)


def publish_rank(
    replica_id: str, rank: int, stats: Callable[[], RankStats], interval_s: float = PUSH_INTERVAL_S
) -> None:
    """From a rank's actor: shows its own counters until the process ends, on a thread of its own."""
    mirror = GaugeMirror()

    def run() -> None:
        while True:
            with contextlib.suppress(Exception):  # what breaks the rank is said elsewhere
                mirror.show(rank_families([(replica_id, rank, stats())]))
            time.sleep(interval_s)

    threading.Thread(target=run, name="rank-metrics", daemon=True).start()
