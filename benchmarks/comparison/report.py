"""The page of results: targets next to what was measured, then one table for each part. Knows no way to measure."""

import time
from collections.abc import Iterator, Sequence

from comparison.parts import PARTS, Part
from comparison.results import MACHINE, Results
from comparison.subjects import Subject
from comparison.targets import bandwidth_limit, outcomes


def page(results: Results, subjects: Sequence[Subject]) -> str:
    return "\n".join(_lines(results, subjects)) + "\n"


def _lines(results: Results, subjects: Sequence[Subject]) -> Iterator[str]:
    yield "# Peers: Tramontane, vLLM and llama.cpp on one machine"
    yield ""
    machine = results.note(MACHINE, MACHINE) or "Nothing was measured yet"
    yield f"{machine}; server, client and ranks share the cores. `make bench-peers`, {time.strftime('%F')}."
    yield "Medians over all rounds, with the smallest and the largest in parentheses. How it is measured: [README](../README.md)."
    yield ""
    limits = {name: results.median(MACHINE, MACHINE, name) for name in ("read_bandwidth", "float32", "bfloat16")}
    if None not in limits.values():
        yield (
            f"Measured in the same rounds: read bandwidth {limits['read_bandwidth'] or 0:.3g} B/s, "
            f"matrix product {limits['float32'] or 0:.3g} FLOP/s in fp32, {limits['bfloat16'] or 0:.3g} in bf16."
        )
        load = results.median(MACHINE, MACHINE, "load") or 0.0
        yield f"Load average before a round: {load:.1f}. Above 1, other programs took part of the machine, and only ratios mean something."
        yield ""
    yield "## Targets"
    yield ""
    yield "| target | goal | measured | met | held against |"
    yield "|---|---|---|---|---|"
    for outcome in outcomes(results):
        target = outcome.target
        sign = "at most" if target.at_most else "at least"
        measured = "not measured" if outcome.ratio is None else f"{outcome.ratio:.2f} {target.unit}"
        met = {None: "", True: "yes", False: "**no**"}[outcome.met]
        yield f"| {target.text} | {sign} {target.goal:g} {target.unit} | {measured} | {met} | {target.limit} |"
    for part in PARTS.values():
        yield from _table(results, [s for s in subjects if part.includes(s)], part)


def _table(results: Results, subjects: Sequence[Subject], part: Part) -> Iterator[str]:
    names = [s.name for s in subjects]
    metrics = list(dict.fromkeys(key for name in names for r in results.of(part.name, name) for key in r.metrics))
    if not metrics and not any(results.error(part.name, name) for name in names):
        return
    yield from ("", f"## {part.title}", "")
    shows_limit = part.name == "decode"
    titles = ["", *(_title(metric) for metric in metrics), *(["limit of one stream"] if shows_limit else []), "rounds"]
    yield f"| {' | '.join(titles)} |"
    yield "|---" * len(titles) + "|"
    for subject in subjects:
        records = results.of(part.name, subject.name)
        cells = [subject.name, *(_cell(results, part.name, subject.name, metric=metric) for metric in metrics)]
        if shows_limit:
            limit = bandwidth_limit(results, subject)
            cells.append(f"{limit:,.0f}" if limit else "")
        error = results.error(part.name, subject.name) or "not measured"
        cells.append(str(len(records)) if records else error.replace("|", "/").replace("\n", " "))
        yield f"| {' | '.join(cells)} |"


def _title(metric: str) -> str:
    """`gap_p99_ms@8` -> `gap p99 ms, 8`."""
    name, _, streams = metric.partition("@")
    return name.replace("_", " ") + (f", {streams}" if streams else "")


def _cell(results: Results, part: str, subject: str, *, metric: str) -> str:
    value, spread = results.median(part, subject, metric), results.spread(part, subject, metric)
    if value is None or spread is None:
        return ""
    return (
        f"{_number(value)} ({_number(spread[0])} to {_number(spread[1])})" if spread[0] < spread[1] else _number(value)
    )


def _number(value: float) -> str:
    if value >= 1e6:
        return f"{value:.3g}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
