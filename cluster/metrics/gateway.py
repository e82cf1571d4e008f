"""One gateway's Prometheus metrics: counters and histograms that requests feed, and the samples of collector.py.

Uses vLLM's names, suffixes and bucket bounds where vLLM has the metric, with the prefix `tramontane:`, or `vllm:` for dashboards and
gateways made for vLLM. The label `engine` is vLLM's word for a replica. Owns its registry, so two servers in one process stay separate.
Does not know HTTP. Every gateway exports every replica: use `max by (engine)` for a replica's metrics and `sum` for a gateway's (see
docs/monitoring.md).
"""

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from cluster.batch.records import BatchRecord
from cluster.config.serve import MetricsPrefix
from cluster.metrics.collector import DroppedSpans, JoinedCollector, StateCollector
from cluster.metrics.token_counts import TokenCounts
from cluster.protocol.view import ClusterView
from cluster.responses.counts import ResponseCounts
from cluster.router.router import Router
from workers.protocol import FinishReason

# vLLM's bounds, and finer ones below its first: a small model generates a token in less than a millisecond.
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

LINE_OUTCOMES = ("completed", "failed")


class Metrics:
    """One gateway's metrics, of one served model. Counts are per sequence; times are seconds as measured by the gateway.

    view: returns the newest ClusterView or None; without a view there are no metrics of ranks and of replicas that are not ready.
    batches: returns the batches that have not ended; every gateway exports all of them. responses: of this gateway's stored responses.
    beside: those of another model at this gateway; both are in one registry, with the same names and another `model_name`.
    """

    def __init__(
        self,
        router: Router,
        *,
        model_name: str,
        prefix: MetricsPrefix = "tramontane",
        view: Callable[[], ClusterView | None] = lambda: None,
        batches: Callable[[], Sequence[BatchRecord]] | None = None,
        responses: ResponseCounts | None = None,
        beside: "Metrics | None" = None,
    ) -> None:
        self.registry: CollectorRegistry = CollectorRegistry() if beside is None else beside.registry
        self._families: dict[str, Any] = {} if beside is None else beside._families
        self._sampled: JoinedCollector = JoinedCollector() if beside is None else beside._sampled
        self.tokens = TokenCounts(model_name=model_name, prefix=f"{prefix}:", bounds=PER_TOKEN_S)
        self._sampled.parts += (
            StateCollector(router, view, batches, responses, model_name, f"{prefix}:"),
            self.tokens,
        )
        if beside is None:
            self.registry.register(self._sampled)
        self._prefix = f"{prefix}:"
        self._model_name = model_name
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of all sequences.")
        self.batch_prompt_tokens = self._counter("batch_prompt_tokens", "Prompt tokens of batch lines.")
        self.batch_generation_tokens = self._counter("batch_generation_tokens", "Generated tokens of batch lines.")
        self.predicted_cached_tokens = self._counter(
            "routing_predicted_cached_tokens", "Prompt tokens that the router expected in the chosen replica's cache."
        )
        self.cached_tokens = self._counter("routing_cached_tokens", "Prompt tokens that were in the replica's cache.")
        self.time_to_first_token = self._histogram(
            "time_to_first_token_seconds", "Seconds from the request to its first token.", FIRST_TOKEN_S
        )
        self.time_per_output_token = self._histogram(
            "request_time_per_output_token_seconds",
            "Mean seconds per token of a sequence, after its first.",
            PER_TOKEN_S,
        )
        self.e2e_latency = self._histogram(
            "e2e_request_latency_seconds", "Seconds from the request to its last token.", REQUEST_S
        )
        self.queue_time = self._histogram(
            "request_queue_time_seconds", "Seconds from the request until a replica is assigned to it.", REQUEST_S
        )
        self.request_prompt_tokens = self._histogram(
            "request_prompt_tokens", "Prompt tokens of a finished sequence.", NUM_TOKENS
        )
        self.request_generation_tokens = self._histogram(
            "request_generation_tokens", "Generated tokens of a finished sequence.", NUM_TOKENS
        )
        self._success = self._family(
            Counter, "request_success", "Finished sequences.", ["model_name", "finished_reason"]
        )
        for reason in FinishReason:
            self._success.labels(model_name, reason.value)  # a rate needs a zero before the first event
        self._lines = self._family(
            Counter, "batch_lines", "Batch lines answered by this gateway.", ["model_name", "outcome"]
        )
        for outcome in LINE_OUTCOMES:
            self._lines.labels(model_name, outcome)
        by_adapter = ["model_name", "adapter", "revision"]
        self._adapter_success = self._family(
            Counter, "adapter_request_success", "Finished sequences of an adapter.", [*by_adapter, "finished_reason"]
        )
        self._adapter_prompt_tokens = self._family(
            Counter, "adapter_prompt_tokens", "Prompt tokens of an adapter's sequences.", by_adapter
        )
        self._adapter_generation_tokens = self._family(
            Counter, "adapter_generation_tokens", "Generated tokens of an adapter.", by_adapter
        )
        self._http = self._family(Counter, "http_requests", "HTTP responses.", ["path", "status"])
        self._key_tokens = self._family(Counter, "key_tokens", "Tokens of an API key's requests.", ["key", "kind"])
        self._certificate = self._family(
            Gauge,
            "tls_certificate_expires_timestamp_seconds",
            "Unix time at which the gateway's certificate ends.",
            ["model_name"],
        )

    def sequence(
        self, *, num_prompt_tokens: int, arrived: float, is_line: bool = False, adapter: str | None = None
    ) -> "SequenceMetrics":
        """The observer of one sequence. arrived: time.monotonic() at the first byte of its request. is_line: it is a batch line.

        adapter: the revision that it uses.
        """
        return SequenceMetrics(
            self, num_prompt_tokens=num_prompt_tokens, arrived=arrived, is_line=is_line, adapter=adapter
        )

    def finished(self, reason: str, adapter: str | None = None) -> None:
        """Counts a sequence by its finish reason: stop, length, abort (the client disconnected) or error."""
        self._success.labels(self._model_name, reason).inc()
        if adapter is not None:
            self._adapter_success.labels(*self._adapter_labels(adapter), reason).inc()

    def used_adapter(self, adapter: str, *, num_prompt_tokens: int = 0, num_tokens: int = 0) -> None:
        """Counts tokens of a revision."""
        labels = self._adapter_labels(adapter)
        self._adapter_prompt_tokens.labels(*labels).inc(num_prompt_tokens)
        self._adapter_generation_tokens.labels(*labels).inc(num_tokens)

    def forget_adapters(self, revisions: Iterable[str]) -> None:
        """Ends the series of revisions that are gone, so that reloads do not add up."""
        for revision in revisions:
            labels = dict(zip(("model_name", "adapter", "revision"), self._adapter_labels(revision), strict=True))
            for counter in (self._adapter_success, self._adapter_prompt_tokens, self._adapter_generation_tokens):
                counter.remove_by_labels(labels)

    def _adapter_labels(self, revision: str) -> tuple[str, str, str]:
        return self._model_name, revision.partition("@")[0], revision

    def line_answered(self, *, completed: bool) -> None:
        """Counts a batch line that has its result."""
        self._lines.labels(self._model_name, LINE_OUTCOMES[0 if completed else 1]).inc()

    def answered(self, path: str, status: int) -> None:
        """Counts an HTTP response. path: the pattern of the route, so unknown paths add no new series."""
        self._http.labels(path, str(status)).inc()

    def used_by_key(self, name: str, *, num_prompt_tokens: int, num_output_tokens: int) -> None:
        """Counts the tokens of one request of an API key."""
        self._key_tokens.labels(name, "prompt").inc(num_prompt_tokens)
        self._key_tokens.labels(name, "output").inc(num_output_tokens)

    def watch_certificate(self, expires_at: Callable[[], float]) -> None:
        """expires_at: Unix time, asked at each scrape, since a certificate may be renewed."""
        self._certificate.labels(self._model_name).set_function(expires_at)

    def watch_spans(self, num_dropped: Callable[[], int]) -> None:
        """num_dropped: asked at each scrape."""
        self.registry.register(DroppedSpans(num_dropped, self._model_name, self._prefix))

    @property
    def prefix(self) -> str:
        """What the names begin with: `tramontane:` or `vllm:`."""
        return self._prefix

    def render(self) -> bytes:
        """The Prometheus text format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str) -> Counter:
        counter: Counter = self._family(Counter, name, text, ["model_name"]).labels(self._model_name)
        return counter

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        family = self._family(Histogram, name, text, ["model_name"], buckets=buckets)
        histogram: Histogram = family.labels(self._model_name)
        return histogram

    def _family(self, make: Callable[..., Any], name: str, text: str, labels: Sequence[str], **more: Any) -> Any:
        """The metric of this name, which all models share."""
        if name not in self._families:
            self._families[name] = make(self._prefix + name, text, labels, registry=self.registry, **more)
        return self._families[name]


class SequenceMetrics:
    """Turns the events of one sequence into observations. Call `ended` exactly once. now: time.monotonic().

    Batch lines yield to online requests: their tokens count, but their times would say nothing about the service.
    """

    def __init__(
        self,
        metrics: Metrics,
        *,
        num_prompt_tokens: int,
        arrived: float,
        is_line: bool = False,
        adapter: str | None = None,
    ) -> None:
        self._metrics = metrics
        self._adapter = adapter
        self._is_line = is_line
        self._num_prompt_tokens = num_prompt_tokens
        self._arrived = arrived
        self._num_tokens = 0
        self._first: float | None = None
        self._last = arrived

    def routed(self, *, num_predicted_cached: int, num_cached: int) -> None:
        """Prompt tokens that the router expected in the cache, and those that were there."""
        self._metrics.predicted_cached_tokens.inc(num_predicted_cached)
        self._metrics.cached_tokens.inc(num_cached)

    def queued(self, queue_s: float) -> None:
        """The seconds until a replica was assigned."""
        if not self._is_line:
            self._metrics.queue_time.observe(queue_s)

    def produced(self, num_tokens: int, now: float) -> None:
        """One delta of `num_tokens` new tokens."""
        if not num_tokens:
            return
        m = self._metrics
        if self._adapter is not None:
            is_first = self._first is None
            m.used_adapter(
                self._adapter,
                num_prompt_tokens=self._num_prompt_tokens if is_first else 0,
                num_tokens=num_tokens,
            )
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
            m.tokens.add_gap((now - self._last) / num_tokens)
        self._last = now
        self._num_tokens += num_tokens
        m.tokens.num_tokens += num_tokens

    def ended(self, reason: str, now: float | None = None) -> None:
        """reason: stop, length, abort (the client disconnected) or error. Only stop and length count in durations and sizes."""
        m = self._metrics
        m.finished(reason, self._adapter)
        if reason not in (FinishReason.STOP, FinishReason.LENGTH) or self._is_line:
            return
        m.e2e_latency.observe((time.monotonic() if now is None else now) - self._arrived)
        m.request_prompt_tokens.observe(self._num_prompt_tokens)
        m.request_generation_tokens.observe(self._num_tokens)
        if self._first is not None and self._num_tokens > 1:
            m.time_per_output_token.observe((self._last - self._first) / (self._num_tokens - 1))
