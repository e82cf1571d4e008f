"""The table of docs/monitoring.md names every metric that a gateway exports, and no other."""

import re

from prometheus_client.parser import text_string_to_metric_families
from support.fakes.router import FakeRouter, make_view
from support.paths import ROOT

from cluster.metrics.gateway import Metrics

PAGE = (ROOT / "docs" / "monitoring.md").read_text(encoding="utf-8")
# Described with batches instead.
BATCHES = (ROOT / "docs" / "batches.md").read_text(encoding="utf-8")


def exported() -> set[str]:
    """Names without prefix, counters with `_total`."""
    metrics = Metrics(FakeRouter(), model_name="m", view=make_view, batches=tuple)
    metrics.answered("/v1/completions", 200)
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
