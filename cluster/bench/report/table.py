"""Results as tables for a terminal. Knows rich's tables and how numbers are written; not where they come from."""

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.text import Text

from cluster.bench.report.results import Results, Row
from cluster.bench.statistics import METRICS, PERCENTILES, Spread
from cluster.terminal.tables import plain_table

NONE = "–"
COLUMNS = (("TTFT ms", "ttft"), ("Gap ms", "gap"), ("End to end ms", "e2e"))


def tables(results: Results) -> RenderableType:
    """The table of levels, the ratios of two servers, and the remarks."""
    parts: list[RenderableType] = [_levels(results)]
    if any(len(row.runs) > 1 for row in results.rows):
        parts.append(Text("Medians over the rounds; in brackets the lowest and the highest round."))
    parts += _ratios(results)
    if results.remarks:
        parts += [Text(), *(Text(f"- {remark}") for remark in results.remarks)]
    return Group(*parts)


def number(value: float) -> str:
    """Three digits that count."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.1 or value == 0 else f"{value:.2g}"


def spread(found: Spread | None) -> str:
    """`12.3 [11.9 to 12.8]`; without the range where it has one value."""
    if found is None:
        return NONE
    text = number(found.median)
    return text if found.low == found.high else f"{text} [{number(found.low)} to {number(found.high)}]"


def percentiles(row: Row, name: str) -> str:
    found = [row.metrics.get(f"{name}_p{p}") for p in PERCENTILES]
    return " / ".join(number(f.median) if f else NONE for f in found)


def _levels(results: Results) -> RenderableType:
    table = plain_table()
    table.add_column("Load")
    if len(results.servers) > 1:
        table.add_column("Server")
    for title in ("OK", "Failed", *(f"{title} p50/90/99" for title, _ in COLUMNS), "Tokens/s", "Requests/s"):
        table.add_column(title, justify="right")
    if results.objective is not None:
        table.add_column("Goodput/s", justify="right")
    if results.price_per_hour is not None:
        table.add_column("USD/M tokens", justify="right")
    table.add_column("Client CPU", justify="right")
    for row in results.rows:
        cells = [row.label, *([row.server.name] if len(results.servers) > 1 else [])]
        cells += [f"{row.num_ok:,}", f"{row.num_failed:,}", *(percentiles(row, name) for _, name in COLUMNS)]
        cells += [spread(row.metrics.get("tokens_per_s")), spread(row.metrics.get("requests_per_s"))]
        if results.objective is not None:
            met = row.metrics.get("met")
            cells.append(spread(row.metrics.get("goodput")) + (f" ({met.median:.0f}%)" if met else ""))
        if results.price_per_hour is not None:
            cells.append(spread(row.metrics.get("usd_per_million")))
        cells.append(f"{max(r.cpu_share for r in row.runs):.0%}")
        table.add_row(*cells)
    return table


def _ratios(results: Results) -> Iterator[RenderableType]:
    for comparison in results.comparisons:
        table = plain_table()
        table.add_column(f"{comparison.label}: {results.servers[1].name} to {results.servers[0].name}")
        table.add_column("Ratio", justify="right")
        table.add_column("")
        for name, ratio in comparison.ratios.items():
            table.add_row(METRICS[name].title, spread(ratio), verdict(name, ratio))
        yield Text()
        yield table


def verdict(name: str, ratio: Spread) -> str:
    """Better or worse only where every round agrees; one round decides nothing."""
    if ratio.low == ratio.high:
        return ""
    is_more = METRICS[name].is_more_better
    if ratio.low > 1:
        return "better" if is_more else "worse"
    if ratio.high < 1:
        return "worse" if is_more else "better"
    return "no clear difference"
