"""Calls the autoscaler's pure function with the controller's records and reports, and keeps its state between rounds.

Knows records, reports and `cluster.autoscaler.decide`; no Ray and no replicas.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from cluster.autoscaler.decide import decide
from cluster.autoscaler.state import AutoscalerConfig, AutoscalerState, Observation
from cluster.protocol.report import BatchDemand, GatewayReport
from cluster.protocol.spec import ClusterSpec
from cluster.protocol.view import ReplicaRecord, ReplicaState

# How long the batches of a stopped gateway still count: another gateway takes them over when their lease expires.
TAKEOVER_S = 60.0


class GatewayTotal:
    """The sum of a counter over all gateways. A gateway that joins or leaves with a large count causes no jump."""

    def __init__(self) -> None:
        self._total = 0
        self._last: dict[str, int] = {}  # by gateway

    def add(self, totals: Mapping[str, int]) -> int:
        self._total += sum(max(0, total - self._last.get(name, total)) for name, total in totals.items())
        self._last = dict(totals)
        return self._total


class Scaling:
    """The scaling of one deployment. `reason`: one sentence about the newest decision."""

    def __init__(self, spec: ClusterSpec) -> None:
        self.reason = ""
        self.configure(spec)
        self._state = AutoscalerState(num_replicas=0)
        self._arrived, self._batch_tokens = GatewayTotal(), GatewayTotal()
        self._batches: dict[str, tuple[float, BatchDemand, str]] = {}  # by batch: seen when, and at which gateway

    def configure(self, spec: ClusterSpec) -> None:
        """Sets new bounds and objectives; keeps the observations so far."""
        self._config = AutoscalerConfig(
            min_replicas=spec.min_replicas,
            max_replicas=spec.max_replicas,
            ttft_objective_s=spec.ttft_objective_s,
            scale_down_after_s=spec.scale_down_after_s,
        )

    def initial(self, num_live: int) -> int:
        """The number to start with: the running replicas, within the bounds, but at least one, to prove that the model can be served."""
        number = min(max(num_live, self._config.min_replicas, 1), self._config.max_replicas)
        return self._set(number, f"{number} replicas to start with.")

    def wake(self) -> int:
        """From none to one, for a waiting request."""
        return self._set(max(1, self._state.num_replicas), "0 -> 1: a request is waiting.")

    def wake_for_batch(self) -> int:
        """From none to one, for a batch. That replica is removed when the batch ends."""
        batch = replace(self._state.batch, num_replicas=max(1, self._state.batch.num_replicas))
        self._state = replace(self._state, batch=batch)
        self.reason = "0 -> 1: a batch is waiting."
        return batch.num_replicas

    def decide(self, records: Sequence[ReplicaRecord], reports: Sequence[GatewayReport], now: float) -> int:
        """How many replicas there should be. now: time.monotonic()."""
        arrived = self._arrived.add({r.gateway_id: r.arrived_tokens_total for r in reports})
        observation = replace(
            observe(records, reports, arrived_tokens_total=arrived),
            batches=self.known_batches(reports, now),
            batch_tokens_total=self._batch_tokens.add({r.gateway_id: r.batch_tokens_total for r in reports}),
        )
        self._state, decision = decide(self._config, observation, self._state, now)
        self.reason = decision.reason
        return decision.num_replicas

    def known_batches(self, reports: Sequence[GatewayReport], now: float) -> tuple[BatchDemand, ...]:
        """The reported batches, and those of gateways that stopped reporting less than TAKEOVER_S ago."""
        here = {r.gateway_id for r in reports}
        kept = {
            batch_id: (seen, demand, gateway)
            for batch_id, (seen, demand, gateway) in self._batches.items()
            if gateway not in here and now - seen <= TAKEOVER_S
        }
        self._batches = kept | {d.batch_id: (now, d, r.gateway_id) for r in reports for d in r.batches}
        return tuple(demand for _, demand, _ in self._batches.values())

    def _set(self, number: int, reason: str) -> int:
        self._state = replace(self._state, num_replicas=number)
        self.reason = reason
        return number


def observe(
    records: Sequence[ReplicaRecord], reports: Sequence[GatewayReport], *, arrived_tokens_total: int
) -> Observation:
    """The cluster in the autoscaler's terms, without batch lines, because those yield. Speeds are means over the ready replicas that have
    measured one.
    """
    ready = [r for r in records if r.state is ReplicaState.READY]
    starting = [r for r in records if r.state in (ReplicaState.PLACING, ReplicaState.STARTING)]
    loads = [r.load for r in ready]
    speeds = [load.tokens_per_s for load in loads if load.tokens_per_s]
    startups = [r.ready_at - r.started_at for r in ready if r.ready_at is not None and r.started_at]
    ttfts = [r.ttft_p95_s for r in reports if r.ttft_p95_s is not None]
    looked_up = sum(load.prefix_queries_total - load.background_prefix_queries_total for load in loads)
    found = sum(load.prefix_hits_total - load.background_prefix_hits_total for load in loads)
    pending = sum(load.num_pending_tokens - load.num_background_pending_tokens for load in loads)
    on_replicas = [load.num_running + load.num_waiting - load.num_background for load in loads]
    usages = [(load.num_used_blocks - load.num_background_blocks) / max(1, load.num_blocks) for load in loads]
    return Observation(
        num_ready=len(ready),
        num_starting=len(starting),
        num_backlog_tokens=sum(r.num_queued_tokens for r in reports) + pending,
        num_requests=sum(r.num_queued for r in reports) + sum(on_replicas),
        num_running=sum(min(load.num_running, n) for load, n in zip(loads, on_replicas, strict=True)),
        max_num_seqs=ready[0].facts.max_num_seqs if ready and ready[0].facts else 0,
        kv_cache_usage=sum(usages) / max(1, len(loads)),
        arrived_tokens_total=arrived_tokens_total,
        prompt_hit_rate=found / looked_up if looked_up else 0.0,
        prefill_tokens_per_s=sum(speeds) / len(speeds) if speeds else None,
        ttft_p95_s=max(ttfts, default=None),
        startup_s=max(startups, default=None),
    )
