"""Sources for metrics and dashboards: a scripted router, and the view of a cluster with two replicas of two ranks."""

from dataclasses import dataclass, field
from types import SimpleNamespace

from cluster.protocol.view import ClusterView, RankRecord, ReplicaRecord, ReplicaState
from workers.device.sensors import GpuReading
from workers.protocol import LoadReport
from workers.rank.reports import RankStats

LOAD = LoadReport(
    num_running=3,
    num_waiting=2,
    num_pending_tokens=70,
    num_blocks=200,
    num_used_blocks=50,
    num_steps_total=10,
    num_preemptions_total=1,
    prompt_tokens_total=900,
    generated_tokens_total=400,
    prefix_queries_total=900,
    prefix_hits_total=300,
    last_step_s=0.02,
    step_s_total=0.2,
)


@dataclass
class FakeRouter:
    loads: dict[str, LoadReport] = field(default_factory=lambda: {"r0": LOAD, "r1": LoadReport()})
    ready: frozenset[str] = frozenset({"r0"})
    num_inflight_requests: int = 6
    num_waiting: int = 1
    num_queued_tokens: int = 128
    num_failovers_total: int = 2
    num_numerics_changes_total: int = 1
    used_adapters: tuple[set[str], set[str]] = field(default_factory=lambda: (set(), set()))
    facts: SimpleNamespace = field(
        default_factory=lambda: SimpleNamespace(
            block_size=16, dtype="bfloat16", kv_cache_dtype="int8", kv_token_bytes=264
        )
    )

    def adapters(self) -> tuple[set[str], set[str]]:
        return self.used_adapters

    def health(self) -> SimpleNamespace:
        statuses = [
            SimpleNamespace(
                replica_id=i, ready=i in self.ready, load=load, numerics="float32-sdpa-tp2-0123456789abcdef"
            )
            for i, load in self.loads.items()
        ]
        return SimpleNamespace(replicas=statuses)


GPU = GpuReading(name="NVIDIA A10G", used_bytes=21 << 30, total_bytes=24 << 30, temperature_c=61)


def rank(replica_id: str, number: int, *, num_steps: int, gpu: GpuReading | None = None) -> RankRecord:
    """Steps of 20 ms, 5 ms of each in four all-reduces."""
    stats = RankStats(
        num_steps_total=num_steps,
        step_s_total=0.02 * num_steps,
        num_all_reduces_total=4 * num_steps,
        all_reduce_s_total=0.005 * num_steps,
        gpu=gpu,
    )
    return RankRecord(rank=number, node_id="n", node_ip="10.0.0.2", actor_name=f"{replica_id}-{number}", stats=stats)


def make_view(*, num_steps: int = 10) -> ClusterView:
    replicas = [
        ReplicaRecord(
            replica_id=replica_id,
            incarnation="a",
            state=state,
            ranks=tuple(rank(replica_id, number, num_steps=num_steps, gpu=GPU) for number in range(2)),
        )
        for replica_id, state in (("r0", ReplicaState.READY), ("r1", ReplicaState.STARTING))
    ]
    return ClusterView(version=1, controller_id="c", replicas=tuple(replicas), num_desired=2)
