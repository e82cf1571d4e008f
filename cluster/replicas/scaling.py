"""Feeds the autoscaler's pure function with what the controller sees, and keeps its state between rounds.

Knows records, reports and `cluster.autoscaler`; no Ray, and no replica itself.
"""

from collections.abc import Sequence
from dataclasses import replace

from cluster.autoscaler import AutoscalerConfig, AutoscalerState, Observation, decide
from cluster.replicas.state import ClusterSpec, GatewayReport, ReplicaRecord, ReplicaState


class Scaling:
    """One deployment's scaling. `reason`: one sentence on the newest decision."""

    def __init__(self, spec: ClusterSpec) -> None:
        self.reason = ""
        self.configure(spec)
        self._state = AutoscalerState(num_replicas=0)
        self._arrived_total = 0
        self._arrived_at: dict[str, int] = {}  # by gateway, as last reported

    def configure(self, spec: ClusterSpec) -> None:
        """New bounds or objectives; what was seen so far stays."""
        self._config = AutoscalerConfig(
            min_replicas=spec.min_replicas,
            max_replicas=spec.max_replicas,
            ttft_objective_s=spec.ttft_objective_s,
            scale_down_after_s=spec.scale_down_after_s,
        )

    def initial(self, num_live: int) -> int:
        """How many to begin with: those that run, within the bounds; at least one, which shows that the model can be served."""
        number = min(max(num_live, self._config.min_replicas, 1), self._config.max_replicas)
        return self._set(number, f"{number} to begin with.")

    def wake(self) -> int:
        """From none to one, for a request that waits."""
        return self._set(max(1, self._state.num_replicas), "0 -> 1: a request waits.")

    def decide(self, records: Sequence[ReplicaRecord], reports: Sequence[GatewayReport], now: float) -> int:
        """How many replicas there should be. now: time.monotonic()."""
        observation = observe(records, reports, arrived_tokens_total=self._count_arrivals(reports))
        self._state, decision = decide(self._config, observation, self._state, now)
        self.reason = decision.reason
        return decision.num_replicas

    def _count_arrivals(self, reports: Sequence[GatewayReport]) -> int:
        """A gateway that comes or goes with a large total of its own is no burst and no lull."""
        now = {r.gateway_id: r.arrived_tokens_total for r in reports}
        self._arrived_total += sum(max(0, total - self._arrived_at.get(name, total)) for name, total in now.items())
        self._arrived_at = now
        return self._arrived_total

    def _set(self, number: int, reason: str) -> int:
        self._state = replace(self._state, num_replicas=number)
        self.reason = reason
        return number


def observe(
    records: Sequence[ReplicaRecord], reports: Sequence[GatewayReport], *, arrived_tokens_total: int
) -> Observation:
    """The cluster in the autoscaler's terms. Speeds are means over the ready replicas that have measured one."""
    ready = [r for r in records if r.state is ReplicaState.READY]
    starting = [r for r in records if r.state in (ReplicaState.PLACING, ReplicaState.STARTING)]
    loads = [r.load for r in ready]
    speeds = [load.tokens_per_s for load in loads if load.tokens_per_s]
    startups = [r.ready_at - r.started_at for r in ready if r.ready_at is not None and r.started_at]
    ttfts = [r.ttft_p95_s for r in reports if r.ttft_p95_s is not None]
    looked_up = sum(load.prefix_queries_total for load in loads)
    return Observation(
        num_ready=len(ready),
        num_starting=len(starting),
        num_backlog_tokens=sum(r.num_queued_tokens for r in reports) + sum(load.num_pending_tokens for load in loads),
        num_requests=sum(r.num_queued for r in reports) + sum(load.num_running + load.num_waiting for load in loads),
        num_running=sum(load.num_running for load in loads),
        max_num_seqs=ready[0].facts.max_num_seqs if ready and ready[0].facts else 0,
        kv_cache_usage=sum(load.num_used_blocks / max(1, load.num_blocks) for load in loads) / max(1, len(loads)),
        arrived_tokens_total=arrived_tokens_total,
        prompt_hit_rate=sum(load.prefix_hits_total for load in loads) / looked_up if looked_up else 0.0,
        prefill_tokens_per_s=sum(speeds) / len(speeds) if speeds else None,
        ttft_p95_s=max(ttfts, default=None),
        startup_s=max(startups, default=None),
    )
