"""What Prometheus reads: replica states sampled at the scrape, and counters and histograms that requests feed.

Knows metric names (vLLM's, under the prefix `tramontane:`). Owns its registry, so that two servers in one process do not meet.
Does not know HTTP; cluster/api/health.py serves `render()`.
"""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from cluster.router.router import Router

_P = "tramontane:"
_SHORT_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 5.0)
_FIRST_TOKEN_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
_LONG_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0)

_GAUGES = (
    ("num_requests_running", "Sequences the replica is computing.", lambda r: r.num_running),
    ("num_requests_waiting", "Sequences waiting on the replica.", lambda r: r.num_waiting),
    ("kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.", lambda r: r.num_used_blocks / max(r.num_blocks, 1)),
    ("last_step_seconds", "Time of the newest engine step.", lambda r: r.last_step_s),
)
_COUNTERS = (
    ("num_preemptions", "Sequences put back for want of KV blocks.", lambda r: r.num_preemptions_total),
    ("engine_steps", "Engine steps.", lambda r: r.num_steps_total),
    ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", lambda r: r.prefix_queries_total),
    ("prefix_cache_hits", "Prompt tokens found in the prefix cache.", lambda r: r.prefix_hits_total),
)


class _ReplicaCollector(Collector):
    def __init__(self, router: Router) -> None:
        self._router = router

    def describe(self) -> list[Metric]:
        return []  # nothing to sample at registration: replicas may not be reachable yet

    def collect(self) -> Iterator[Metric]:
        health = self._router.health()
        ready = GaugeMetricFamily(_P + "replica_ready", "1 when the replica takes requests.", labels=["replica"])
        for status in health.replicas:
            ready.add_metric([status.replica_id], float(status.ready))
        yield ready
        inflight = GaugeMetricFamily(_P + "num_requests_inflight", "Sequences this gateway holds.")
        inflight.add_metric([], self._router.num_inflight_requests)
        yield inflight
        for family, rows in ((GaugeMetricFamily, _GAUGES), (CounterMetricFamily, _COUNTERS)):
            for name, text, value in rows:
                metric = family(_P + name, text, labels=["replica"])
                for status in health.replicas:
                    metric.add_metric([status.replica_id], _float(value(status.load)))
                yield metric


def _float(value: object) -> float:
    assert isinstance(value, int | float)
    return float(value)


class Metrics:
    """One gateway's metrics. Counts are per sequence; times are seconds as the gateway saw them."""

    def __init__(self, router: Router, *, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_ReplicaCollector(router))
        r, model = self.registry, {"model_name": model_name}
        labels = ["model_name"]
        self.prompt_tokens = Counter(_P + "prompt_tokens", "Prompt tokens.", labels, registry=r).labels(**model)
        self.generation_tokens = Counter(_P + "generation_tokens", "Generated tokens.", labels, registry=r).labels(
            **model
        )
        self.time_to_first_token = Histogram(
            _P + "time_to_first_token_seconds",
            "From the request to its first token.",
            labels,
            registry=r,
            buckets=_FIRST_TOKEN_S,
        ).labels(**model)
        self.inter_token_latency = Histogram(
            _P + "inter_token_latency_seconds",
            "Between two tokens of a sequence.",
            labels,
            registry=r,
            buckets=_SHORT_S,
        ).labels(**model)
        self.e2e_latency = Histogram(
            _P + "e2e_request_latency_seconds",
            "From the request to its last token.",
            labels,
            registry=r,
            buckets=_LONG_S,
        ).labels(**model)
        self._model_name = model_name
        self._success = Counter(
            _P + "request_success", "Finished sequences.", ["model_name", "finished_reason"], registry=r
        )
        self._http = Counter(_P + "http_requests", "HTTP answers.", ["path", "status"], registry=r)

    def finished(self, reason: str) -> None:
        """Counts a sequence by why it ended: stop, length, abort (the client left) or error."""
        self._success.labels(self._model_name, reason).inc()

    def answered(self, path: str, status: int) -> None:
        """Counts an HTTP answer. path is the route's pattern, so that strangers' paths make no new series."""
        self._http.labels(path, str(status)).inc()

    def render(self) -> bytes:
        """The Prometheus text format."""
        return generate_latest(self.registry)
