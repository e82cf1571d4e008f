"""The table of docs/monitoring.md names every metric that a gateway exports, and no other."""

import re
from dataclasses import replace
from types import SimpleNamespace

from prometheus_client.parser import text_string_to_metric_families
from support.fakes.router import FakeRouter, make_view
from support.paths import ROOT

from cluster.metrics.gateway import Metrics
from cluster.protocol.view import ClusterView
from cluster.responses.counts import ResponseCounts

PAGE = (ROOT / "docs" / "monitoring.md").read_text(encoding="utf-8")
# Described with batches instead.
BATCHES = (ROOT / "docs" / "batches.md").read_text(encoding="utf-8")


def exported() -> set[str]:
    """Names without prefix, counters with `_total`."""
    engine = SimpleNamespace(enable_lora=True, max_loras=1)

    def view() -> ClusterView:
        return replace(make_view(), spec=SimpleNamespace(engine=engine))  # type: ignore[arg-type]

    metrics = Metrics(FakeRouter(), model_name="m", view=view, batches=tuple, responses=ResponseCounts())
    metrics.answered("/v1/completions", 200)
    metrics.watch_spans(lambda: 0)
    families = text_string_to_metric_families(metrics.render().decode())
    names = {f.name + ("_total" if f.type == "counter" else "") for f in families if not f.name.endswith("_created")}
    return {name.removeprefix("tramontane:") for name in names}


def named() -> set[str]:
    table = PAGE.partition("| Metric, after `tramontane:` |")[2].partition("\n\n")[0]
    cells = [row.split(" | ")[0] for row in table.splitlines()[2:]]
    return {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}


def test_every_metric_is_on_a_page() -> None:
    missing = {name for name in exported() - named() if f"{name}`" not in BATCHES}
    assert not missing, f"docs/monitoring.md lacks {sorted(missing)}"


def test_every_metric_of_the_table_is_exported() -> None:
    assert named() - exported() == set()
