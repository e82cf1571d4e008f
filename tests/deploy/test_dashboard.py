"""Every metric and label of the dashboard and the alerts is exported by /metrics or through Ray; the YAML is valid."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from support.fakes.router import FakeRouter, make_view
from support.paths import ROOT

from cluster.config.serve import METRICS_PREFIXES
from cluster.metrics.gateway import Metrics
from cluster.ray_runtime.metrics import GaugeMirror
from cluster.responses.counts import ResponseCounts

DEPLOY = ROOT / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana" / "dashboards" / "tramontane.json").read_text())
ALERTS = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())
PANELS = [p for p in DASHBOARD["panels"] if p["type"] != "row"]
OF_PROMETHEUS = {"instance", "job"}  # labels the scrape adds
# Of Ray itself and of NVIDIA's dcgm-exporter.
OF_OTHERS = re.compile(r"\b(ray_node_\w+|DCGM_FI_DEV_\w+)")

METRIC = re.compile(r"(\$\{prefix\}|tramontane:)(\w+)(?:\{([^}]*)\})?")
MATCHER = re.compile(r'(\w+)\s*(?:=~|!~|!=|=)\s*"[^"]*"')
GROUPING = re.compile(r"\b(?:by|on|without)\s*\(([^)]*)\)")

Labels = dict[str, set[str]]


def make_metrics(prefix: str = "tramontane") -> Metrics:
    metrics = Metrics(FakeRouter(), model_name="m", prefix=prefix, view=make_view, responses=ResponseCounts())
    metrics.answered("/v1/completions", 200)
    metrics.used_by_key("alice", num_prompt_tokens=1, num_output_tokens=1)
    metrics.used_adapter("a@1", num_prompt_tokens=1, num_tokens=1)
    metrics.watch_certificate(lambda: 0.0)
    return metrics


def scraped(prefix: str) -> Labels:
    """What a scrape of a gateway shows: labels by metric name without its prefix."""
    families = text_string_to_metric_families(make_metrics(prefix).render().decode())
    return {s.name.removeprefix(f"{prefix}:"): set(s.labels) for f in families for s in f.samples}


def shown_by_ray() -> Labels:
    shown: Labels = {}

    class Gauge:
        def __init__(self, name: str, _: str, tag_keys: tuple[str, ...]) -> None:
            shown[name.removeprefix("tramontane_")] = set(tag_keys)

        def set(self, *_: object) -> None: ...

    GaugeMirror(Gauge).show(make_metrics().registry.collect())
    return shown


def expressions() -> Iterator[tuple[str, str, str]]:
    """(where, expression, legend)."""
    for panel in PANELS:
        for target in panel["targets"]:
            yield f"panel {panel['title']!r}", target["expr"], target["legendFormat"]
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            yield f"variable {variable['name']!r}", variable["query"]["query"], ""
    for group in ALERTS["groups"]:
        for rule in group["rules"]:
            yield f"alert {rule['alert']}", rule["expr"], ""


@pytest.mark.parametrize("prefix", [*METRICS_PREFIXES, "ray"])
def test_every_expression_uses_metrics_and_labels_that_exist(prefix: str) -> None:
    known = shown_by_ray() if prefix == "ray" else scraped(prefix)
    num_metrics = 0
    for where, expression, _ in expressions():
        found = METRIC.findall(expression)
        if OF_OTHERS.search(expression):
            assert not found, f"{where} mixes metrics of two sources"
            continue
        assert found or expression.startswith("up{"), f"{where} uses no metric: {expression}"
        groupings = {x.strip() for part in GROUPING.findall(expression) for x in part.split(",")} - OF_PROMETHEUS
        for _, name, matchers in found:
            num_metrics += 1
            assert name in known, f"{where} uses {name}, which is not in /metrics; there are {sorted(known)}"
            labels = set(MATCHER.findall(matchers)) | groupings
            assert labels <= known[name], f"{where} uses {labels - known[name]} of {name}, which has {known[name]}"
    assert num_metrics > 60, "the expressions were not understood"


def test_legends_name_labels_that_the_expression_keeps() -> None:
    for where, expression, legend in expressions():
        for label in re.findall(r"\{\{(\w+)\}\}", legend):
            kept = {x.strip() for part in GROUPING.findall(expression) for x in part.split(",")}
            assert label in kept, f"the legend of {where} shows {label}, which {expression} drops"


def test_panels_have_unique_ids_and_do_not_overlap() -> None:
    panels: list[dict[str, Any]] = DASHBOARD["panels"]
    assert len({p["id"] for p in panels}) == len(panels)
    taken: dict[tuple[int, int], str] = {}
    for panel in panels:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24, f"{panel['title']} is wider than the page"
        for cell in ((at["x"] + i, at["y"] + j) for i in range(at["w"]) for j in range(at["h"])):
            assert cell not in taken, f"{panel['title']} lies on {taken[cell]}"
            taken[cell] = panel["title"]


def test_the_dashboard_shows_what_an_operator_needs() -> None:
    used = {name for _, expression, _ in expressions() for _, name, _ in METRIC.findall(expression)}
    for name in (
        *("num_requests_running", "num_requests_waiting", "num_requests_queued", "kv_cache_usage_perc"),
        *("time_to_first_token_seconds_bucket", "inter_token_latency_seconds_bucket", "generation_tokens_total"),
        *("e2e_request_latency_seconds_bucket", "prefix_cache_hits_total", "num_preemptions_total"),
        *("num_failovers_total", "num_replicas_desired", "num_replicas_ready", "replica_state"),
        *("rank_step_seconds_total", "rank_all_reduce_seconds_total", "routing_predicted_cached_tokens_total"),
        *("http_requests_total", "key_tokens_total", "adapter_generation_tokens_total"),
        *("tls_certificate_expires_timestamp_seconds", "stored_responses_total"),
        *("rank_gpu_memory_used_bytes", "rank_gpu_temperature_celsius"),
    ):
        assert name in used, f"no panel shows {name}"
    others = {name for _, expression, _ in expressions() for name in OF_OTHERS.findall(expression)}
    assert others == {
        *("ray_node_gpus_utilization", "ray_node_disk_utilization_percentage"),
        "DCGM_FI_DEV_XID_ERRORS",
    }


def test_the_dashboard_uses_the_chosen_data_source() -> None:
    sources = {t["datasource"]["uid"] for p in PANELS for t in p["targets"]}
    assert sources == {"${datasource}"}, "a fixed data source exists in one Grafana only"
    prefixes = next(v for v in DASHBOARD["templating"]["list"] if v["name"] == "prefix")
    values = [option["value"] for option in prefixes["options"]]
    assert values == ["tramontane:", "vllm:", "ray_tramontane_", "ray_vllm_"]
    assert re.findall(r" : ([\w:]+)", prefixes["query"]) == values, "Grafana makes the options from `query` again"


def test_prometheus_configuration_scrapes_the_gateway_with_its_key_and_ray() -> None:
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    jobs = {job["job_name"]: job for job in config["scrape_configs"]}
    assert jobs["tramontane"]["authorization"] == {"type": "Bearer", "credentials_file": "api_key"}
    assert jobs["ray"]["file_sd_configs"][0]["files"][0].endswith("/prom_metrics_service_discovery.json")
    named = [*config["rule_files"], *jobs["tramontane"]["file_sd_configs"][0]["files"]]
    assert [(DEPLOY / "prometheus" / name).is_file() for name in named] == [True, True]
    ours = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/tramontane.yml").read_text())["datasources"]
    assert ours[0]["url"] == "${TRAMONTANE_PROMETHEUS}"
    assert ours[0]["jsonData"]["timeInterval"] == config["global"]["scrape_interval"], "rates would have holes"
    provider = yaml.safe_load((DEPLOY / "grafana/provisioning/dashboards/tramontane.yml").read_text())["providers"][0]
    assert provider["options"]["path"] == "${TRAMONTANE_DASHBOARDS}"
