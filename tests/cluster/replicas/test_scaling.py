"""What the controller sees, in the autoscaler's terms."""

import pytest

from cluster.replicas.scaling import Scaling, observe
from cluster.replicas.state import ClusterSpec, GatewayReport, ReplicaRecord, ReplicaState
from workers.protocol import LoadReport


def record(replica_id: str, state: ReplicaState = ReplicaState.READY, **load: float) -> ReplicaRecord:
    return ReplicaRecord(
        replica_id=replica_id, incarnation="i", state=state, load=LoadReport(**load), started_at=100.0, ready_at=107.0
    )


def report(gateway_id: str = "g", **values: float) -> GatewayReport:
    return GatewayReport(gateway_id=gateway_id, url="", **values)


def spec(low: int, high: int) -> ClusterSpec:
    return ClusterSpec(model_name="m", engine=None, min_replicas=low, max_replicas=high)  # type: ignore[arg-type]


def test_observe_adds_up():
    seen = observe(
        [
            record("r0", num_running=3, num_waiting=1, num_pending_tokens=50, tokens_per_s=1000.0),
            record("r1", num_running=2, tokens_per_s=3000.0),
            record("r2", ReplicaState.STARTING),
            record("r3", ReplicaState.LOST, num_running=9),
        ],
        [report(num_queued=4, num_queued_tokens=500, ttft_p95_s=0.5), report("h", ttft_p95_s=0.7)],
        arrived_tokens_total=77,
    )
    assert (seen.num_ready, seen.num_starting, seen.num_running) == (2, 1, 5)
    assert seen.num_requests == 4 + 3 + 1 + 2
    assert seen.num_backlog_tokens == 550
    assert seen.prefill_tokens_per_s == 2000.0
    assert seen.ttft_p95_s == 0.7
    assert seen.startup_s == 7.0
    assert seen.arrived_tokens_total == 77


def test_observe_nothing():
    seen = observe([], [], arrived_tokens_total=0)
    assert (seen.num_ready, seen.prefill_tokens_per_s, seen.startup_s, seen.ttft_p95_s) == (0, None, None, None)


@pytest.mark.parametrize(
    ("low", "high", "live", "expected"), [(2, 2, 0, 2), (0, 4, 0, 1), (1, 4, 3, 3), (1, 2, 5, 2), (0, 0, 0, 0)]
)
def test_initial(low, high, live, expected):
    assert Scaling(spec(low, high)).initial(live) == expected


def test_a_gateway_that_comes_with_a_large_total_is_no_burst():
    scaling = Scaling(spec(1, 8))
    assert scaling._count_arrivals([report("a", arrived_tokens_total=100)]) == 0
    assert scaling._count_arrivals([report("a", arrived_tokens_total=150)]) == 50
    assert (
        scaling._count_arrivals([report("a", arrived_tokens_total=150), report("b", arrived_tokens_total=10**9)]) == 50
    )
    assert scaling._count_arrivals([report("b", arrived_tokens_total=10**9 + 7)]) == 57


def test_a_waiting_request_wakes_the_first_replica():
    scaling = Scaling(spec(0, 2))
    assert scaling.wake() == 1
    assert "waits" in scaling.reason
