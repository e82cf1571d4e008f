"""The controller's records and reports in the autoscaler's terms."""

from dataclasses import replace

import pytest

from cluster.controller.scaling import TAKEOVER_S, GatewayTotal, Scaling, observe
from cluster.protocol.report import BatchDemand, GatewayReport
from cluster.protocol.spec import ClusterSpec
from cluster.protocol.view import ReplicaRecord, ReplicaState
from workers.protocol import LoadReport


def record(replica_id: str, state: ReplicaState = ReplicaState.READY, **load: float) -> ReplicaRecord:
    return ReplicaRecord(
        replica_id=replica_id, incarnation="i", state=state, load=LoadReport(**load), started_at=100.0, ready_at=107.0
    )


def report(gateway_id: str = "g", **values: float) -> GatewayReport:
    return GatewayReport(gateway_id=gateway_id, url="", **values)


def spec(low: int, high: int) -> ClusterSpec:
    return ClusterSpec(model_name="m", engine=None, min_replicas=low, max_replicas=high)  # type: ignore[arg-type]


def test_observe_adds_up_all_replicas_and_gateways():
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


def test_observe_without_replicas():
    seen = observe([], [], arrived_tokens_total=0)
    assert (seen.num_ready, seen.prefill_tokens_per_s, seen.startup_s, seen.ttft_p95_s) == (0, None, None, None)


@pytest.mark.parametrize(
    ("low", "high", "live", "expected"), [(2, 2, 0, 2), (0, 4, 0, 1), (1, 4, 3, 3), (1, 2, 5, 2), (0, 0, 0, 0)]
)
def test_the_initial_number(low, high, live, expected):
    assert Scaling(spec(low, high)).initial(live) == expected


def test_a_gateway_that_joins_with_a_large_total_causes_no_jump():
    total = GatewayTotal()
    assert total.add({"a": 100}) == 0
    assert total.add({"a": 150}) == 50
    assert total.add({"a": 150, "b": 10**9}) == 50
    assert total.add({"b": 10**9 + 7}) == 57


def test_a_waiting_request_wakes_the_first_replica():
    scaling = Scaling(spec(0, 2))
    assert scaling.wake() == 1
    assert "is waiting" in scaling.reason


def test_batch_lines_do_not_count_as_online_load():
    seen = observe(
        [
            record(
                "r0",
                num_running=10, num_waiting=4, num_background=12, num_pending_tokens=900, num_background_pending_tokens=850,
                num_blocks=100, num_used_blocks=80, num_background_blocks=70,
                prefix_queries_total=1_000, prefix_hits_total=800,
                background_prefix_queries_total=900, background_prefix_hits_total=800,
            )
        ],
        [],
        arrived_tokens_total=0,
    )  # fmt: skip
    assert (seen.num_requests, seen.num_running, seen.num_backlog_tokens) == (2, 2, 50)
    assert (seen.kv_cache_usage, seen.prompt_hit_rate) == (0.1, 0.0)


def test_a_batch_starts_a_replica_that_is_removed_when_the_batch_ends():
    scaling = Scaling(spec(0, 4))
    batch = BatchDemand(batch_id="b", remaining_tokens=10**9)
    assert scaling.wake_for_batch() == 1
    assert scaling.reason == "0 -> 1: a batch is waiting."
    assert scaling.decide([], [report(batches=(batch,))], 1.0) == 1
    assert scaling.decide([record("r0")], [report()], 2.0) == 0
    assert scaling.reason == "1 -> 0: no batch is running."


def test_a_batch_counts_until_another_gateway_takes_it_over():
    scaling = Scaling(spec(0, 4))
    batch = BatchDemand(batch_id="b", remaining_tokens=10**9)
    assert scaling.decide([], [report("a", batches=(batch,)), report("b")], 1.0) == 1
    assert scaling.decide([], [report("b")], TAKEOVER_S) == 1, "its gateway died"
    taken = replace(batch, remaining_tokens=5)
    assert scaling.known_batches([report("b", batches=(taken,))], TAKEOVER_S + 0.5) == (taken,), "counted once"
    assert scaling.decide([], [report("b")], TAKEOVER_S + 1.0) == 0, "it ended at its new gateway"
    assert scaling.decide([], [report("a", batches=(batch,))], 100.0) == 1
    assert scaling.decide([], [], 101.0 + TAKEOVER_S) == 0, "no gateway took it over"
