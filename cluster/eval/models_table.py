"""The table of models: quality by category, cost and speed, of any number of servers and adapters, from saved results.

Reads the report.json of `tramontane eval` and the JSON of `tramontane bench`; writes Markdown, JSON and a page. Measures nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from cluster.eval.page import head, rows
from cluster.eval.plot import Bar, bars
from cluster.eval.report import NONE, Prices, money, speed
from workers.errors import ConfigError

TITLES = {"code": "Code", "crm": "CRM", "docs": "Docs", "marketing": "Marketing", "reasoning": "Reasoning"}


class SavedShare(msgspec.Struct):
    """See `report.as_json`. passed: None for a mean or a value of a whole task."""

    value: float
    low: float | None = None
    high: float | None = None
    passed: int | None = None


class SavedSuite(msgspec.Struct):
    share: SavedShare | None
    num_items: int
    num_errors: int
    prompt_tokens: int
    output_tokens: int
    requests_per_s: float | None = None
    cost_usd: float | None = None


class SavedModel(msgspec.Struct):
    name: str
    suites: dict[str, SavedSuite]
    total: SavedSuite


class SavedReport(msgspec.Struct):
    models: list[SavedModel]
    is_whole: bool


class _Median(msgspec.Struct):
    median: float


class _Level(msgspec.Struct):
    level: str
    server: int
    metrics: dict[str, _Median]


class _Server(msgspec.Struct):
    model: str


class SavedBench(msgspec.Struct):
    """See `cluster.bench.report.json_file`."""

    servers: list[_Server]
    levels: list[_Level]


@dataclass(frozen=True, kw_only=True)
class Row:
    """load: at which `requests_per_s` was measured; None where it is that of the evaluation itself."""

    name: str
    suites: Mapping[str, SavedSuite]
    total: SavedSuite
    is_whole: bool
    cost_usd: float | None
    requests_per_s: float | None
    load: str | None


@dataclass(frozen=True, kw_only=True)
class ModelsTable:
    """suites: the columns, those of the page first. notes: how to read it."""

    suites: Sequence[str]
    rows: Sequence[Row]
    notes: Sequence[str]


def put_together(
    reports: Sequence[tuple[str | None, SavedReport]],
    benches: Sequence[tuple[str | None, SavedBench]],
    *,
    prices: Prices,
    price_per_hour: float | None = None,
) -> ModelsTable:
    """Each with the name of its row; None: the model's. prices, price_per_hour: instead of the prices that reports were made with.

    Raises ConfigError for a name that two rows have, and for a benchmark without a row.
    """
    speeds = _speeds(benches)
    found: list[Row] = []
    for label, report in reports:
        if label is not None and len(report.models) > 1:
            raise ConfigError(
                f"The results named {label!r} are of {len(report.models)} models.",
                remedy="Leave the name out, or give results of one model.",
                param="--report",
            )
        for model in report.models:
            name = label or model.name
            if any(row.name == name for row in found):
                raise ConfigError(
                    f"Two rows have the name {name!r}.", remedy="Name them: --report NAME=FOLDER.", param="--report"
                )
            rate, load = speeds.pop(name, (model.total.requests_per_s, None))
            total = model.total
            cost = prices.of(total.prompt_tokens, total.output_tokens)
            if cost is None and price_per_hour is not None and rate:
                cost = total.num_items / rate / 3600 * price_per_hour
            elif cost is None:
                cost = total.cost_usd
            row = Row(
                name=name,
                suites=model.suites,
                total=total,
                is_whole=report.is_whole,
                cost_usd=cost,
                requests_per_s=rate,
                load=load,
            )
            found.append(row)
    if speeds:
        raise ConfigError(
            f"--bench has results of {', '.join(map(repr, speeds))}, of which --report has no row.",
            remedy="Name them like their rows: --bench NAME=FILE.",
            param="--bench",
        )
    names = list(dict.fromkeys(suite for row in found for suite in row.suites))
    suites = [name for name in TITLES if name in names] + [name for name in names if name not in TITLES]
    return ModelsTable(suites=suites, rows=found, notes=_notes(found, prices=prices, price_per_hour=price_per_hour))


def _speeds(benches: Sequence[tuple[str | None, SavedBench]]) -> dict[str, tuple[float, str | None]]:
    """Name -> (requests a second, load) at the load that made the most."""
    speeds: dict[str, tuple[float, str | None]] = {}
    for label, bench in benches:
        if label is not None and len(bench.servers) > 1:
            raise ConfigError(
                f"The benchmark named {label!r} is of {len(bench.servers)} servers.",
                remedy="Leave the name out, or give a benchmark of one server.",
                param="--bench",
            )
        for i, server in enumerate(bench.servers):
            loads = [
                (level.metrics["requests_per_s"].median, level.level)
                for level in bench.levels
                if level.server == i and "requests_per_s" in level.metrics
            ]
            if loads:
                name = label or server.model
                if name in speeds:
                    raise ConfigError(
                        f"Two benchmarks are of {name!r}.", remedy="Name them: --bench NAME=FILE.", param="--bench"
                    )
                speeds[name] = max(loads)
    return speeds


def _notes(found: Sequence[Row], *, prices: Prices, price_per_hour: float | None) -> list[str]:
    notes = ["Shares that are right, with their 95 % intervals."]
    numbers = sorted({row.total.num_items for row in found})
    questions = " or ".join(map(str, numbers))
    if prices.prompt is not None or prices.output is not None:
        per = f"{prices.prompt or 0:g} USD for a million tokens of prompts and {prices.output or 0:g} of answers"
        notes.append(f"Cost: of all {questions} questions, at {per}.")
    elif price_per_hour is not None:
        notes.append(
            f"Cost: of all {questions} questions at this speed, on a machine for {price_per_hour:g} USD an hour."
        )
    elif any(row.cost_usd is not None for row in found):
        notes.append(f"Cost: of all {questions} questions, at the prices of each evaluation.")
    loads = {row.load for row in found if row.load is not None}
    if loads:
        notes.append(f"Speed: requests a second with {' or '.join(sorted(loads))}, by `tramontane bench`.")
    if any(row.load is None and row.requests_per_s is not None for row in found):
        rest = " of the others" if loads else ""
        notes.append(f"Speed{rest}: the inverse of the mean time of an answer in the evaluation.")
    notes += [f"{row.name}: interrupted, not every question was asked." for row in found if not row.is_whole]
    notes += [
        f"{row.name}: {row.total.num_errors} questions have an error and count as failed."
        for row in found
        if row.total.num_errors
    ]
    return notes


def cells(found: ModelsTable) -> list[tuple[str, ...]]:
    """Head and rows."""
    titles = (TITLES.get(suite, suite) for suite in found.suites)
    table: list[tuple[str, ...]] = [("Model", *titles, "Cost USD", "Speed rps")]
    for row in found.rows:
        shares = (_shown(row.suites[suite].share) if suite in row.suites else NONE for suite in found.suites)
        table.append((row.name, *shares, money(row.cost_usd), speed(row.requests_per_s)))
    return table


def _shown(share: SavedShare | None) -> str:
    """ "85% (71 to 93)"; a mean as a plain number."""
    if share is None:
        return NONE
    if share.passed is None:
        bounds = "" if share.low is None or share.high is None else f" ({share.low:.4g} to {share.high:.4g})"
        return f"{share.value:.4g}{bounds}"
    return f"{share.value:.0%} ({100 * (share.low or 0):.0f} to {100 * (share.high or 0):.0f})"


def markdown(found: ModelsTable) -> str:
    top, *rest = ([cell.replace("|", "\\|") for cell in row] for row in cells(found))
    lines = [f"| {' | '.join(top)} |", f"|---|{'---:|' * (len(top) - 1)}"]
    lines += [f"| {' | '.join(row)} |" for row in rest]
    return "\n".join([*lines, "", " ".join(found.notes), ""])


def as_json(found: ModelsTable) -> dict[str, Any]:
    return {
        "models": [
            {
                "name": row.name,
                "suites": {name: msgspec.to_builtins(suite.share) for name, suite in row.suites.items()},
                "total": msgspec.to_builtins(row.total),
                "cost_usd": row.cost_usd,
                "requests_per_s": row.requests_per_s,
                "load": row.load,
                "is_whole": row.is_whole,
            }
            for row in found.rows
        ],
        "notes": list(found.notes),
    }


def page(found: ModelsTable) -> str:
    """One HTML page that needs nothing else."""
    models = [
        (
            row.name,
            {
                suite: Bar(share.value, share.low or 0.0, share.high or 0.0, _shown(share))
                for suite in found.suites
                if suite in row.suites and (share := row.suites[suite].share) is not None and share.passed is not None
            },
        )
        for row in found.rows
    ]
    groups = [suite for suite in found.suites if any(suite in shares for _, shares in models)]
    notes = rows([(note,) for note in ("Notes", *found.notes)])
    return "\n".join([head("Models"), *rows(cells(found)), bars(groups, models), *notes, "</body></html>\n"])
