"""What Prometheus reads: replicas and ranks sampled at the scrape, and counters and histograms that requests feed.

Knows metric names: vLLM's names, suffixes and bucket bounds where vLLM has the metric, under the prefix `tramontane:`, or `vllm:` for
dashboards and gateways made for vLLM. The label `engine` is vLLM's word for a replica. Owns its registry, so that two servers in one
process stay apart. Does not know HTTP. Every gateway exports every replica: use `max by (engine)` for a replica's metrics and `sum` for
a gateway's (see docs/monitoring.md).
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from cluster.batch.records import BatchRecord
from cluster.config.serve import MetricsPrefix
from cluster.metrics.ranks import rank_families
from cluster.protocol.view import ClusterView, ReplicaState
from cluster.router.router import Router
from workers.errors import ReplicaUnavailableError
from workers.protocol import FinishReason

# vLLM's bounds, and finer ones below its first: a small model makes a token in less than a millisecond.
# fmt: off
FIRST_TOKEN_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)
PER_TOKEN_S = (
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)
REQUEST_S = (
    0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)
NUM_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
# fmt: on

_GAUGES = (
    ("num_requests_running", "Sequences the replica is computing.", lambda r: r.num_running),
    ("num_requests_waiting", "Sequences waiting on the replica.", lambda r: r.num_waiting),
    ("num_pending_tokens", "Tokens to compute before every sequence has its next one.", lambda r: r.num_pending_tokens),
    ("kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.", lambda r: r.num_used_blocks / max(r.num_blocks, 1)),
    ("last_step_seconds", "Time of the newest engine step.", lambda r: r.last_step_s),
)
_COUNTERS = (
    ("num_preemptions", "Sequences put back for want of KV blocks.", lambda r: r.num_preemptions_total),
    ("engine_steps", "Engine steps.", lambda r: r.num_steps_total),
    ("engine_step_seconds", "Time in engine steps.", lambda r: r.step_s_total),
    ("engine_prompt_tokens", "Prompt tokens the replica took.", lambda r: r.prompt_tokens_total),
    ("engine_generation_tokens", "Tokens the replica generated.", lambda r: r.generated_tokens_total),
    ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", lambda r: r.prefix_queries_total),
    ("prefix_cache_hits", "Prompt tokens found in the prefix cache.", lambda r: r.prefix_hits_total),
)

LINE_OUTCOMES = ("completed", "failed")


Row = tuple[Sequence[str], float]  # label values and the value


class _StateCollector(Collector):
    """Samples what the router and the newest view say at the moment of the scrape."""

    def __init__(
        self,
        router: Router,
        view: Callable[[], ClusterView | None],
        batches: Callable[[], Sequence[BatchRecord]] | None,
        model_name: str,
        prefix: str,
    ) -> None:
        self._router = router
        self._view = view
        self._batches = batches
        self._model_name = model_name
        self._prefix = prefix

    def describe(self) -> list[Metric]:
        return []  # nothing to sample at registration: replicas may not be reachable yet

    def collect(self) -> Iterator[Metric]:
        yield from self._gateway()
        yield from self._replicas()
        if self._batches is not None:
            yield from self._backlog(self._batches())
        view = self._view()
        if view is not None:
            yield from self._cluster(view)

    def _gateway(self) -> Iterator[Metric]:
        router = self._router
        yield self._gauge(
            "num_requests_inflight", "Sequences this gateway holds.", [((), router.num_inflight_requests)]
        )
        yield self._gauge("num_requests_queued", "Sequences waiting in this gateway.", [((), router.num_waiting)])
        yield self._gauge("num_queued_tokens", "Their prompt tokens.", [((), router.num_queued_tokens)])
        yield self._counter(
            "num_failovers", "Sequences that went on elsewhere in mid-stream.", [((), router.num_failovers_total)]
        )

    def _backlog(self, batches: Sequence[BatchRecord]) -> Iterator[Metric]:
        lines, tokens = sum(b.num_lines - b.num_answered for b in batches), sum(b.remaining_tokens for b in batches)
        yield self._gauge("num_batches_running", "Batches that have not ended.", [((), len(batches))])
        yield self._gauge("num_batch_lines_pending", "Their lines without an answer.", [((), lines)])
        yield self._gauge(
            "num_batch_tokens_pending", "An estimate of these lines' tokens, answers included.", [((), tokens)]
        )

    def _replicas(self) -> Iterator[Metric]:
        replicas = self._router.health().replicas
        ready = [((s.replica_id,), float(s.ready)) for s in replicas]
        yield self._gauge("replica_ready", "1 when the replica takes requests.", ready, "engine")
        yield self._gauge(
            "num_replicas_ready", "Replicas that take requests.", [((), sum(value for _, value in ready))]
        )
        for make, rows in ((self._gauge, _GAUGES), (self._counter, _COUNTERS)):
            for name, text, value in rows:
                yield make(name, text, [((s.replica_id,), value(s.load)) for s in replicas], "engine")
        try:
            block_size = self._router.facts.block_size
        except ReplicaUnavailableError:
            return
        caches = [((s.replica_id, str(block_size), str(s.load.num_blocks)), 1.0) for s in replicas if s.load.num_blocks]
        yield self._gauge(
            "cache_config_info", "The KV cache's shape.", caches, "engine", "block_size", "num_gpu_blocks"
        )

    def _cluster(self, view: ClusterView) -> Iterator[Metric]:
        yield self._gauge("num_replicas_desired", "Replicas there shall be.", [((), view.num_desired)])
        left_s = {(n.node_ip, n.source): max(0.0, n.deadline - time.time()) for n in view.notices}
        yield self._gauge("node_leaving_seconds", "Until the node is taken away.", left_s.items(), "node", "source")
        yield self._counter("preemption_notices", "Nodes that were to be taken away.", [((), view.num_notices_total)])
        # While a lost replica is being ended its successor may carry its id: the newest speaks.
        replicas = {r.replica_id: r for r in sorted(view.replicas, key=lambda r: r.started_at)}.values()
        states = [((r.replica_id, s.value), float(r.state is s)) for r in replicas for s in ReplicaState]
        yield self._gauge("replica_state", "1 for the state the replica is in.", states, "engine", "state")
        ranks = [(r.replica_id, k.rank, k.stats) for r in replicas for k in r.ranks]
        yield from rank_families(ranks, prefix=self._prefix, model_name=self._model_name)

    def _gauge(self, name: str, text: str, rows: Iterable[Row], *labels: str) -> Metric:
        family = GaugeMetricFamily(self._prefix + name, text, labels=["model_name", *labels])
        for values, value in rows:
            family.add_metric([self._model_name, *values], value)
        return family

    def _counter(self, name: str, text: str, rows: Iterable[Row], *labels: str) -> Metric:
        family = CounterMetricFamily(self._prefix + name, text, labels=["model_name", *labels])
        for values, value in rows:
            family.add_metric([self._model_name, *values], value)
        return family


class Metrics:
    """One gateway's metrics. Counts are per sequence; times are seconds as the gateway saw them.

    view: the newest ClusterView, None where there is none; without it nothing is said of ranks and of replicas that are not there yet.
    batches: those that have not ended; every gateway tells of all of them.
    """

    def __init__(
        self,
        router: Router,
        *,
        model_name: str,
        prefix: MetricsPrefix = "tramontane",
        view: Callable[[], ClusterView | None] = lambda: None,
        batches: Callable[[], Sequence[BatchRecord]] | None = None,
    ) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_StateCollector(router, view, batches, model_name, f"{prefix}:"))
        self._prefix = f"{prefix}:"
        self._model_name = model_name
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens.")
        self.generation_tokens = self._counter("generation_tokens", "Generated tokens.")
        self.batch_prompt_tokens = self._counter("batch_prompt_tokens", "Of them, those of batches' lines.")
        self.batch_generation_tokens = self._counter("batch_generation_tokens", "Of them, those of batches' lines.")
        self.predicted_cached_tokens = self._counter(
            "routing_predicted_cached_tokens", "Prompt tokens the router expected in the chosen replica's cache."
        )
        self.cached_tokens = self._counter("routing_cached_tokens", "Prompt tokens that were in the replica's cache.")
        self.time_to_first_token = self._histogram(
            "time_to_first_token_seconds", "From the request to its first token.", FIRST_TOKEN_S
        )
        self.inter_token_latency = self._histogram(
            "inter_token_latency_seconds", "Between two tokens of a sequence.", PER_TOKEN_S
        )
        self.time_per_output_token = self._histogram(
            "request_time_per_output_token_seconds", "A sequence's mean time per token after its first.", PER_TOKEN_S
        )
        self.e2e_latency = self._histogram(
            "e2e_request_latency_seconds", "From the request to its last token.", REQUEST_S
        )
        self.queue_time = self._histogram(
            "request_queue_time_seconds", "From the request to a replica that takes it.", REQUEST_S
        )
        self.request_prompt_tokens = self._histogram(
            "request_prompt_tokens", "Prompt tokens of a finished sequence.", NUM_TOKENS
        )
        self.request_generation_tokens = self._histogram(
            "request_generation_tokens", "Generated tokens of a finished sequence.", NUM_TOKENS
        )
        r = self.registry
        self._success = Counter(
            self._prefix + "request_success", "Finished sequences.", ["model_name", "finished_reason"], registry=r
        )
        for reason in FinishReason:
            self._success.labels(model_name, reason.value)  # a rate needs the zero before the first
        self._lines = Counter(
            self._prefix + "batch_lines",
            "Lines of batches this gateway answered.",
            ["model_name", "outcome"],
            registry=r,
        )
        for outcome in LINE_OUTCOMES:
            self._lines.labels(model_name, outcome)
        self._http = Counter(self._prefix + "http_requests", "HTTP answers.", ["path", "status"], registry=r)

    def sequence(self, *, num_prompt_tokens: int, arrived: float, is_line: bool = False) -> "SequenceMetrics":
        """What observes one sequence. arrived: time.monotonic() at its request's first byte. is_line: of a batch."""
        return SequenceMetrics(self, num_prompt_tokens=num_prompt_tokens, arrived=arrived, is_line=is_line)

    def finished(self, reason: str) -> None:
        """Counts a sequence by why it ended: stop, length, abort (the client left) or error."""
        self._success.labels(self._model_name, reason).inc()

    def line_answered(self, *, completed: bool) -> None:
        """Counts a line of a batch that has its result."""
        self._lines.labels(self._model_name, LINE_OUTCOMES[0 if completed else 1]).inc()

    def answered(self, path: str, status: int) -> None:
        """Counts an HTTP answer. path is the route's pattern, so that strangers' paths make no new series."""
        self._http.labels(path, str(status)).inc()

    def render(self) -> bytes:
        """The Prometheus text format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(self._prefix + name, text, ["model_name"], registry=self.registry).labels(self._model_name)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        family = Histogram(self._prefix + name, text, ["model_name"], registry=self.registry, buckets=buckets)
        return family.labels(self._model_name)


class SequenceMetrics:
    """Turns one sequence's events into observations. Call `ended` exactly once; `now` is time.monotonic().

    Lines of batches wait for whatever is none: their tokens count, their times would say nothing about the service.
    """

    def __init__(self, metrics: Metrics, *, num_prompt_tokens: int, arrived: float, is_line: bool = False) -> None:
        self._metrics = metrics
        self._is_line = is_line
        self._num_prompt_tokens = num_prompt_tokens
        self._arrived = arrived
        self._num_tokens = 0
        self._first: float | None = None
        self._last = arrived

    def routed(self, *, num_predicted_cached: int, num_cached: int) -> None:
        """What the router expected to be cached for this prompt, and what was."""
        self._metrics.predicted_cached_tokens.inc(num_predicted_cached)
        self._metrics.cached_tokens.inc(num_cached)

    def queued(self, queue_s: float) -> None:
        """How long it waited until a replica took it."""
        if not self._is_line:
            self._metrics.queue_time.observe(queue_s)

    def produced(self, num_tokens: int, now: float) -> None:
        """One delta of `num_tokens` new tokens."""
        if not num_tokens:
            return
        m = self._metrics
        if self._is_line:
            m.batch_generation_tokens.inc(num_tokens)
        if self._first is None:
            self._first = now
            m.prompt_tokens.inc(self._num_prompt_tokens)
            if self._is_line:
                m.batch_prompt_tokens.inc(self._num_prompt_tokens)
            else:
                m.time_to_first_token.observe(now - self._arrived)
        elif not self._is_line:
            m.inter_token_latency.observe((now - self._last) / num_tokens)
        self._last = now
        self._num_tokens += num_tokens
        m.generation_tokens.inc(num_tokens)

    def ended(self, reason: str, now: float | None = None) -> None:
        """reason: stop, length, abort (the client left) or error. Durations and sizes are of sequences that came to their end."""
        m = self._metrics
        m.finished(reason)
        if reason not in (FinishReason.STOP, FinishReason.LENGTH) or self._is_line:
            return
        m.e2e_latency.observe((time.monotonic() if now is None else now) - self._arrived)
        m.request_prompt_tokens.observe(self._num_prompt_tokens)
        m.request_generation_tokens.observe(self._num_tokens)
        if self._first is not None and self._num_tokens > 1:
            m.time_per_output_token.observe((self._last - self._first) / (self._num_tokens - 1))
