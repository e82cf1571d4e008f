"""Metrics sampled at the scrape: the gateway's router, the replicas, their ranks, the cluster and the batches.

Knows metric names and their sources. Does not know HTTP, or the metrics that requests feed (gateway.py).
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from cluster.batch.records import BatchRecord
from cluster.metrics.ranks import rank_families
from cluster.protocol.view import ClusterView, ReplicaState
from cluster.responses.counts import ENDED, ResponseCounts
from cluster.router.router import Router
from workers.errors import ReplicaUnavailableError

_GAUGES = (
    ("num_requests_running", "Sequences running on the replica.", lambda r: r.num_running),
    ("num_requests_waiting", "Sequences waiting on the replica.", lambda r: r.num_waiting),
    (
        "num_pending_tokens",
        "Tokens to compute before every sequence has its next token.",
        lambda r: r.num_pending_tokens,
    ),
    ("kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.", lambda r: r.num_used_blocks / max(r.num_blocks, 1)),
    ("last_step_seconds", "Duration of the latest engine step, in seconds.", lambda r: r.last_step_s),
)
_COUNTERS = (
    ("num_preemptions", "Sequences preempted because KV blocks ran out.", lambda r: r.num_preemptions_total),
    ("engine_steps", "Engine steps.", lambda r: r.num_steps_total),
    ("engine_step_seconds", "Seconds spent in engine steps.", lambda r: r.step_s_total),
    ("engine_prompt_tokens", "Prompt tokens the replica accepted.", lambda r: r.prompt_tokens_total),
    ("engine_generation_tokens", "Tokens the replica generated.", lambda r: r.generated_tokens_total),
    ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", lambda r: r.prefix_queries_total),
    ("prefix_cache_hits", "Prompt tokens found in the prefix cache.", lambda r: r.prefix_hits_total),
)

Row = tuple[Sequence[str], float]  # label values and the value


class JoinedCollector(Collector):
    """The samples of several collectors, one for each served model, with one family for each name."""

    def __init__(self) -> None:
        self.parts: list[Collector] = []

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for part in self.parts:
            for family in part.collect():
                if family.name in families:
                    families[family.name].samples.extend(family.samples)
                else:
                    families[family.name] = family
        return iter(families.values())


class DroppedSpans(Collector):
    """Spans of this gateway that its collector of traces has not got."""

    def __init__(self, num_dropped: Callable[[], int], model_name: str, prefix: str) -> None:
        self._num_dropped = num_dropped
        self._model_name = model_name
        self._prefix = prefix

    def collect(self) -> Iterator[Metric]:
        text = "Spans that could not be sent to the collector of traces."
        family = CounterMetricFamily(self._prefix + "trace_spans_dropped", text, labels=["model_name"])
        family.add_metric([self._model_name], self._num_dropped())
        yield family


class StateCollector(Collector):
    """Samples the router and the newest view at the moment of the scrape."""

    def __init__(
        self,
        router: Router,
        view: Callable[[], ClusterView | None],
        batches: Callable[[], Sequence[BatchRecord]] | None,
        responses: ResponseCounts | None,
        model_name: str,
        prefix: str,
    ) -> None:
        self._router = router
        self._view = view
        self._batches = batches
        self._responses = responses
        self._model_name = model_name
        self._prefix = prefix

    def describe(self) -> list[Metric]:
        return []  # no samples at registration: replicas may not be reachable yet

    def collect(self) -> Iterator[Metric]:
        yield from self._gateway()
        yield from self._replicas()
        if self._batches is not None:
            yield from self._backlog(self._batches())
        if self._responses is not None:
            yield from self._stored(self._responses)
        view = self._view()
        if view is not None:
            yield from self._cluster(view)

    def _gateway(self) -> Iterator[Metric]:
        router = self._router
        yield self._gauge(
            "num_requests_inflight",
            "Sequences this gateway holds, running or queued.",
            [((), router.num_inflight_requests)],
        )
        yield self._gauge(
            "num_requests_queued", "Sequences waiting in this gateway for a replica.", [((), router.num_waiting)]
        )
        yield self._gauge(
            "num_queued_tokens",
            "Prompt tokens of the sequences that are not on a replica yet.",
            [((), router.num_queued_tokens)],
        )
        yield self._counter(
            "num_failovers", "Sequences that continued on another replica.", [((), router.num_failovers_total)]
        )
        yield self._counter(
            "num_failovers_other_numerics",
            "Of them, those that continued in their middle on a replica that computes other last bits.",
            [((), router.num_numerics_changes_total)],
        )

    def _backlog(self, batches: Sequence[BatchRecord]) -> Iterator[Metric]:
        lines, tokens = sum(b.num_lines - b.num_answered for b in batches), sum(b.remaining_tokens for b in batches)
        yield self._gauge("num_batches_running", "Batches that have not ended.", [((), len(batches))])
        yield self._gauge("num_batch_lines_pending", "Lines of running batches without an answer.", [((), lines)])
        yield self._gauge(
            "num_batch_tokens_pending", "Estimated tokens of the pending lines, answers included.", [((), tokens)]
        )

    def _stored(self, counts: ResponseCounts) -> Iterator[Metric]:
        yield self._gauge(
            "num_stored_responses_running", "Stored responses that this gateway runs.", [((), counts.num_running)]
        )
        ended = [((status,), counts.ended[status]) for status in ENDED]
        yield self._counter("stored_responses", "Stored responses that ended at this gateway.", ended, "status")
        yield self._counter(
            "stored_responses_taken_over",
            "Stored responses that this gateway went on with after another one.",
            [((), counts.num_taken_over)],
        )
        yield self._counter(
            "stored_responses_resumed",
            "Streams of stored responses that clients asked for again.",
            [((), counts.num_resumed)],
        )

    def _replicas(self) -> Iterator[Metric]:
        replicas = self._router.health().replicas
        ready = [((s.replica_id,), float(s.ready)) for s in replicas]
        yield self._gauge("replica_ready", "1 if the replica accepts requests.", ready, "engine")
        yield self._gauge(
            "num_replicas_ready", "Replicas that accept requests.", [((), sum(value for _, value in ready))]
        )
        for make, rows in ((self._gauge, _GAUGES), (self._counter, _COUNTERS)):
            for name, text, value in rows:
                yield make(name, text, [((s.replica_id,), value(s.load)) for s in replicas], "engine")
        numerics = [((s.replica_id, s.numerics), 1.0) for s in replicas if s.numerics]
        yield self._gauge(
            "numerics_info", "Replicas with the same label compute the same bits.", numerics, "engine", "numerics"
        )
        try:
            facts = self._router.facts
        except ReplicaUnavailableError:
            return
        form = facts.dtype if facts.kv_cache_dtype == "auto" else facts.kv_cache_dtype
        caches = [
            ((s.replica_id, str(facts.block_size), str(s.load.num_blocks), form, str(facts.kv_token_bytes)), 1.0)
            for s in replicas
            if s.load.num_blocks
        ]
        yield self._gauge(
            "cache_config_info",
            "Shape of the KV cache, in the labels.",
            caches,
            "engine",
            "block_size",
            "num_gpu_blocks",
            "cache_dtype",
            "bytes_per_token",
        )

    def _cluster(self, view: ClusterView) -> Iterator[Metric]:
        yield self._gauge("num_replicas_desired", "Replicas that the autoscaler wants.", [((), view.num_desired)])
        left_s = {(n.node_ip, n.source): max(0.0, n.deadline - time.time()) for n in view.notices}
        yield self._gauge(
            "node_leaving_seconds", "Seconds until the node is removed.", left_s.items(), "node", "source"
        )
        yield self._counter(
            "preemption_notices", "Preemption notices received, one per node.", [((), view.num_notices_total)]
        )
        # While a lost replica is being stopped, its replacement may have the same id: the newest counts.
        replicas = {r.replica_id: r for r in sorted(view.replicas, key=lambda r: r.started_at)}.values()
        states = [((r.replica_id, s.value), float(r.state is s)) for r in replicas for s in ReplicaState]
        yield self._gauge("replica_state", "1 for the current state of the replica.", states, "engine", "state")
        yield from self._adapters(view)
        ranks = [(r.replica_id, k.rank, k.stats) for r in replicas for k in r.ranks]
        yield from rank_families(ranks, prefix=self._prefix, model_name=self._model_name)

    def _adapters(self, view: ClusterView) -> Iterator[Metric]:
        registry = view.adapters
        roles = ("current", "canary", "previous")
        uses = {getattr(adapter, role): role for adapter in registry.adapters for role in roles}
        rows = [((r.name, r.id, r.state.value, uses.get(r.id, "")), 1.0) for r in registry.revisions]
        yield self._gauge(
            "adapter_revision",
            "1 for each loaded revision of an adapter.",
            rows,
            "adapter",
            "revision",
            "state",
            "role",
        )
        if view.spec is not None and view.spec.engine.enable_lora:
            yield self._lora_requests(view.spec.engine.max_loras)

    def _lora_requests(self, max_loras: int) -> Metric:
        """As vLLM has it, for load balancers that send requests where an adapter is in use."""
        running, waiting = (
            ",".join(sorted({revision.partition("@")[0] for revision in revisions}))
            for revisions in self._router.adapters()
        )
        return self._gauge(
            "lora_requests_info",
            "Adapters of the requests at this gateway; the value is the time.",
            [((str(max_loras), running, waiting), time.time())],
            "max_lora",
            "running_lora_adapters",
            "waiting_lora_adapters",
        )

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
