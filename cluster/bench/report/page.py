"""Results as one HTML page that needs nothing else: styles and plots are inside, and it loads nothing from anywhere."""

from collections.abc import Iterator, Sequence
from html import escape

from cluster.bench.report.charts import charts
from cluster.bench.report.results import Results
from cluster.bench.report.svg import svg
from cluster.bench.report.table import COLUMNS, percentiles, spread, verdict
from cluster.bench.statistics import METRICS

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1180px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; } th, td { padding: .25rem .7rem; border-bottom: 1px solid #8885; text-align: right; }
th:first-child, td:first-child, td.text, th.text { text-align: left; } td { white-space: nowrap; }
.scroll { overflow-x: auto; } .plots { display: flex; flex-wrap: wrap; gap: 1rem; }
figure { margin: 0; } figcaption { font-weight: 600; } svg { max-width: 100%; height: auto; }
code { overflow-wrap: anywhere; } .remarks { border-left: 4px solid #d9822b; padding-left: .8rem; list-style: none; }
"""


def page(results: Results) -> str:
    shape = results.plan.shape
    facts = [
        f"{results.began}, seed {results.plan.seed}, {results.plan.num_rounds} round{'s' * (results.plan.num_rounds != 1)}",
        *(f"{s.name}: model {s.model}, {s.endpoint}" for s in results.servers),
    ]
    if any(level.trace is None for level in results.plan.levels):
        prefix = f" after {shape.shared_prefix:,} shared" if shape.shared_prefix else ""
        facts.append(f"prompts of {shape.prompt.text} tokens{prefix}, answers of {shape.output.text} tokens")
    if results.objective is not None:
        facts.append(f"objective {results.objective.text}")
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
        f"<title>Benchmark of {escape(results.servers[0].name)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>Benchmark of {escape(' and '.join(s.name for s in results.servers))}</h1>",
        f"<p>{'<br>'.join(map(escape, facts))}</p><p><code>{escape(results.command)}</code></p>",
    ]
    if results.remarks:
        parts.append(f'<ul class="remarks">{"".join(f"<li>{escape(r)}</li>" for r in results.remarks)}</ul>')
    parts += ["<h2>Results</h2>", *_levels(results), *_comparisons(results), "<h2>Plots</h2>", '<div class="plots">']
    for chart in charts(results):
        parts.append(f"<figure><figcaption>{escape(chart.title)}</figcaption>{svg(chart)}</figure>")
    parts += ["</div>", *_every_metric(results), "</body></html>"]
    return "\n".join(parts) + "\n"


def _levels(results: Results) -> Iterator[str]:
    head = ["Load", "Server", "OK", "Failed", *(f"{title}, p50 / p90 / p99" for title, _ in COLUMNS)]
    head += ["Tokens/s", "Requests/s", "Client CPU"]
    rows = []
    for row in results.rows:
        cells = [row.label, row.server.name, f"{row.num_ok:,}", f"{row.num_failed:,}"]
        cells += [percentiles(row, name) for _, name in COLUMNS]
        cells += [spread(row.metrics.get("tokens_per_s")), spread(row.metrics.get("requests_per_s"))]
        rows.append([*cells, f"{max(r.cpu_share for r in row.runs):.0%}"])
    yield _table(head, rows)


def _comparisons(results: Results) -> Iterator[str]:
    for comparison in results.comparisons:
        yield f"<h2>{escape(comparison.label)}: {escape(results.servers[1].name)} to {escape(results.servers[0].name)}</h2>"
        rows = [[METRICS[n].title, spread(ratio), verdict(n, ratio)] for n, ratio in comparison.ratios.items()]
        yield _table(["Metric", "Ratio, median [lowest to highest round]", ""], rows)


def _every_metric(results: Results) -> Iterator[str]:
    yield "<h2>Every metric</h2><p>Medians over the rounds; in brackets the lowest and the highest round.</p>"
    several = len(results.servers) > 1
    head = ["Metric", *(f"{row.label}, {row.server.name}" if several else row.label for row in results.rows)]
    rows = [
        [f"{metric.title}, {metric.unit}", *(spread(row.metrics.get(name)) for row in results.rows)]
        for name, metric in METRICS.items()
        if any(name in row.metrics for row in results.rows)
    ]
    yield _table(head, rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"<tr>{''.join(f'<th>{escape(cell)}</th>' for cell in head)}</tr>"]
    lines += [f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows]
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'
