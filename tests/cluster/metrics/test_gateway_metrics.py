"""The content of /metrics under both prefixes, including vLLM's names, labels and bounds."""

import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from prometheus_client.parser import text_string_to_metric_families
from support.fakes.router import FakeRouter, make_view

from cluster.metrics.gateway import Metrics
from cluster.protocol.view import ClusterView, NodeNotice, ReplicaState
from workers.errors import ReplicaUnavailableError
from workers.rank.reports import RankStats

# As vLLM names them, each with the labels its dashboards and the Gateway API's endpoint picker filter by.
OF_VLLM = {
    "num_requests_running": {"model_name", "engine"},
    "num_requests_waiting": {"model_name", "engine"},
    "kv_cache_usage_perc": {"model_name", "engine"},
    "prefix_cache_queries_total": {"model_name", "engine"},
    "prefix_cache_hits_total": {"model_name", "engine"},
    "num_preemptions_total": {"model_name", "engine"},
    "cache_config_info": {"block_size", "num_gpu_blocks", "engine"},
    "prompt_tokens_total": {"model_name"},
    "generation_tokens_total": {"model_name"},
    "request_success_total": {"model_name", "finished_reason"},
    "time_to_first_token_seconds_bucket": {"model_name", "le"},
    "inter_token_latency_seconds_bucket": {"model_name", "le"},
    "request_time_per_output_token_seconds_bucket": {"model_name", "le"},
    "e2e_request_latency_seconds_bucket": {"model_name", "le"},
    "request_queue_time_seconds_bucket": {"model_name", "le"},
    "request_prompt_tokens_bucket": {"model_name", "le"},
    "request_generation_tokens_bucket": {"model_name", "le"},
}
PER_TOKEN_BOUNDS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
REQUEST_BOUNDS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
BOUNDS_OF_VLLM = {
    "time_to_first_token_seconds": (
        *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
        *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
    ),
    "inter_token_latency_seconds": PER_TOKEN_BOUNDS,
    "request_time_per_output_token_seconds": PER_TOKEN_BOUNDS,
    "e2e_request_latency_seconds": REQUEST_BOUNDS,
    "request_queue_time_seconds": REQUEST_BOUNDS,
    "request_prompt_tokens": (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000),
}


def samples(metrics: Metrics) -> dict[str, list[tuple[dict[str, str], float]]]:
    """By name, as a scraper reads them. A scraper refuses a series that appears twice."""
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            rows = found.setdefault(sample.name, [])
            assert sample.labels not in [labels for labels, _ in rows], f"{sample.name}{sample.labels} appears twice"
            rows.append((sample.labels, sample.value))
    return found


def value(metrics: Metrics, name: str, **labels: str) -> float:
    rows = samples(metrics).get(f"tramontane:{name}", [])
    values = [v for row, v in rows if row == {"model_name": "m", **labels}]
    assert len(values) == 1, f"tramontane:{name} with {labels} is not among {rows}"
    return values[0]


@pytest.fixture
def router() -> FakeRouter:
    return FakeRouter()


@pytest.fixture
def metrics(router: FakeRouter) -> Metrics:
    return Metrics(router, model_name="m", view=make_view)


@pytest.mark.parametrize("prefix", ["tramontane", "vllm"])
def test_names_labels_and_bounds_are_those_of_vllm(router: FakeRouter, prefix: str) -> None:
    found = samples(Metrics(router, model_name="m", prefix=prefix, view=make_view))
    assert all(name.startswith(f"{prefix}:") for name in found), f"not all of {sorted(found)} begin with {prefix}:"
    for name, labels in OF_VLLM.items():
        rows = found.get(f"{prefix}:{name}")
        assert rows, f"/metrics has no {prefix}:{name}"
        assert labels <= set(rows[0][0]), f"{prefix}:{name} has the labels {set(rows[0][0])}, dashboards use {labels}"
    for name, bounds in BOUNDS_OF_VLLM.items():
        ours = {float(labels["le"]) for labels, _ in found[f"{prefix}:{name}_bucket"]}
        assert set(bounds) <= ours, f"{name} lacks vLLM's bounds {set(bounds) - ours}"


def test_replicas_and_ranks_are_sampled_at_the_scrape(router: FakeRouter, metrics: Metrics) -> None:
    assert value(metrics, "num_requests_running", engine="r0") == 3
    assert value(metrics, "kv_cache_usage_perc", engine="r0") == 0.25
    assert value(metrics, "kv_cache_usage_perc", engine="r1") == 0, "a replica without blocks yet uses none"
    assert value(metrics, "prefix_cache_hits_total", engine="r0") == 300
    cache = {"block_size": "16", "num_gpu_blocks": "200", "cache_dtype": "int8", "bytes_per_token": "264"}
    assert value(metrics, "cache_config_info", engine="r0", **cache) == 1
    assert [value(metrics, "replica_ready", engine=r) for r in ("r0", "r1")] == [1, 0]
    assert [value(metrics, f"num_replicas_{w}") for w in ("ready", "desired")] == [1, 2]
    assert value(metrics, "replica_state", engine="r1", state="starting") == 1
    assert value(metrics, "replica_state", engine="r1", state="ready") == 0
    assert value(metrics, "rank_step_seconds_total", engine="r1", rank="1") == 0.2
    assert value(metrics, "rank_all_reduce_seconds_total", engine="r0", rank="0") == 0.05
    gpu = {"engine": "r1", "rank": "1", "gpu": "NVIDIA A10G"}
    assert value(metrics, "rank_gpu_memory_used_bytes", **gpu) == 21 << 30
    assert value(metrics, "rank_gpu_memory_bytes", **gpu) == 24 << 30
    assert value(metrics, "rank_gpu_temperature_celsius", **gpu) == 61
    assert value(metrics, "num_requests_queued") == 1
    assert value(metrics, "num_queued_tokens") == 128
    assert value(metrics, "num_failovers_total") == 2
    assert value(metrics, "num_failovers_other_numerics_total") == 1
    assert value(metrics, "numerics_info", engine="r1", numerics="float32-sdpa-tp2-0123456789abcdef") == 1
    router.ready = frozenset({"r0", "r1"})
    assert value(metrics, "num_replicas_ready") == 2


def test_the_adapters_of_requests_are_named_as_vllm_does_it(router: FakeRouter) -> None:
    engine = SimpleNamespace(enable_lora=True, max_loras=3)

    def view() -> ClusterView:
        return replace(make_view(), spec=SimpleNamespace(engine=engine))  # type: ignore[arg-type]

    metrics = Metrics(router, model_name="m", view=view)
    router.used_adapters = {"sql@2", "docs@1", "sql@1"}, {"crm@1"}
    labels = {"max_lora": "3", "running_lora_adapters": "docs,sql", "waiting_lora_adapters": "crm"}
    assert abs(value(metrics, "lora_requests_info", **labels) - time.time()) < 60
    engine.enable_lora = False
    assert "tramontane:lora_requests_info" not in samples(metrics)


def test_a_preempted_node_is_one_series(router: FakeRouter) -> None:
    def notice(node_id: str, left_s: float) -> NodeNotice:
        return NodeNotice(
            node_id=node_id,
            node_ip="10.0.0.2",
            is_head=False,
            source="azure",
            cause="Azure preempts this spot machine.",
            deadline=time.time() + left_s,
            seen_at=0.0,
        )

    view = replace(make_view(), notices=(notice("a", 30.0), notice("b", -5.0)), num_notices_total=3)
    metrics = Metrics(router, model_name="m", view=lambda: view)
    assert value(metrics, "node_leaving_seconds", node="10.0.0.2", source="azure") == 0.0
    assert value(metrics, "preemption_notices_total") == 3
    view = replace(view, notices=())
    assert "tramontane:node_leaving_seconds" not in samples(metrics)


def test_a_replica_and_its_replacement_of_the_same_name_are_one_series(router: FakeRouter) -> None:
    view = make_view()
    old = replace(view.replicas[0], state=ReplicaState.LOST, started_at=1.0)
    new = replace(view.replicas[0], state=ReplicaState.STARTING, started_at=2.0, incarnation="b")
    metrics = Metrics(router, model_name="m", view=lambda: replace(view, replicas=(new, old)))
    assert value(metrics, "replica_state", engine="r0", state="starting") == 1
    assert value(metrics, "replica_state", engine="r0", state="lost") == 0


def test_unknown_values_are_left_out(router: FakeRouter) -> None:
    """No view without a controller, no facts before the first connection, no all-reduce times on CUDA."""

    class Unreached(FakeRouter):
        @property
        def facts(self) -> None:
            raise ReplicaUnavailableError("No replica has been reached yet.")

        @facts.setter
        def facts(self, _: object) -> None: ...

    found = samples(Metrics(Unreached(loads={}), model_name="m"))
    for name in ("cache_config_info", "rank_steps_total", "num_replicas_desired", "replica_ready"):
        assert f"tramontane:{name}" not in found
    view = make_view()
    rank = replace(view.replicas[0].ranks[0], stats=RankStats(num_steps_total=1))
    view = replace(view, replicas=(replace(view.replicas[0], ranks=(rank,)),))
    found = samples(Metrics(router, model_name="m", view=lambda: view))
    assert "tramontane:rank_all_reduce_seconds_total" not in found
    assert "tramontane:rank_steps_total" in found


def test_a_sequence_is_observed_once(metrics: Metrics) -> None:
    sequence = metrics.sequence(num_prompt_tokens=12, arrived=100.0)
    sequence.queued(0.5)
    sequence.routed(num_predicted_cached=8, num_cached=4)
    for num_tokens, now in ((1, 101.0), (0, 101.1), (2, 101.4), (1, 101.6)):
        sequence.produced(num_tokens, now)
    sequence.ended("stop", 101.7)
    expected = {
        "prompt_tokens_total": 12,
        "generation_tokens_total": 4,
        "routing_predicted_cached_tokens_total": 8,
        "routing_cached_tokens_total": 4,
        "time_to_first_token_seconds_sum": 1.0,
        "inter_token_latency_seconds_count": 2,
        "inter_token_latency_seconds_sum": 0.4 / 2 + 0.2,
        "request_time_per_output_token_seconds_sum": 0.6 / 3,
        "e2e_request_latency_seconds_sum": 1.7,
        "request_queue_time_seconds_sum": 0.5,
        "request_prompt_tokens_sum": 12,
        "request_generation_tokens_sum": 4,
    }
    for name, number in expected.items():
        assert value(metrics, name) == pytest.approx(number), name
    assert value(metrics, "request_success_total", finished_reason="stop") == 1
    assert value(metrics, "request_success_total", finished_reason="error") == 0, (
        "a rate needs a zero before the first event"
    )


@pytest.mark.parametrize("reason", ["abort", "error"])
def test_aborted_and_failed_sequences_count_but_are_not_timed(metrics: Metrics, reason: str) -> None:
    sequence = metrics.sequence(num_prompt_tokens=12, arrived=100.0)
    sequence.produced(1, 101.0)
    sequence.ended(reason)
    assert value(metrics, "request_success_total", finished_reason=reason) == 1
    assert value(metrics, "e2e_request_latency_seconds_count") == 0
    assert value(metrics, "request_generation_tokens_count") == 0
    assert value(metrics, "generation_tokens_total") == 1
