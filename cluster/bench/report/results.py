"""The results of a benchmark, put together: a summary of every run, medians over rounds, ratios of two servers, remarks.

Knows runs and statistics; every report reads this and nothing else.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.bench import own_cost
from cluster.bench.load import Loaded
from cluster.bench.objective import Objective
from cluster.bench.probe import Server
from cluster.bench.rounds import Plan, Run
from cluster.bench.statistics import Problem, Spread, Summary, over_rounds, ratios, summarize

JOINED_SHARE = 0.1  # of events; above it the report says that gaps are misleading


@dataclass(frozen=True)
class Row:
    """One level on one server; server_index is its place in the results. runs: of each round, in order. loads: what these come from.
    problems: of all rounds together.
    """

    server: Server
    server_index: int
    label: str
    level: int
    runs: Sequence[Summary]
    loads: Sequence[Loaded]
    metrics: dict[str, Spread]
    problems: dict[str, Problem]

    @property
    def num_ok(self) -> int:
        return sum(r.num_ok for r in self.runs)

    @property
    def num_failed(self) -> int:
        return sum(r.num_failed for r in self.runs)


@dataclass(frozen=True)
class Comparison:
    """Second server to first, on one level."""

    label: str
    ratios: dict[str, Spread]


@dataclass(frozen=True, kw_only=True)
class Results:
    """began: when, in ISO format. command: how it was started. is_whole: it ran to its end."""

    began: str
    command: str
    plan: Plan
    servers: Sequence[Server]
    rows: Sequence[Row]
    comparisons: Sequence[Comparison]
    objective: Objective | None
    price_per_hour: float | None
    is_whole: bool
    remarks: Sequence[str]


def put_together(
    runs: Sequence[Run],
    *,
    plan: Plan,
    servers: Sequence[Server],
    objective: Objective | None,
    price_per_hour: float | None,
    began: str,
    command: str,
    is_whole: bool,
) -> Results:
    rows = []
    by_round: dict[tuple[int, int], dict[int, Summary]] = {}
    for i, level in enumerate(plan.levels):
        for s, server in enumerate(servers):
            mine = [run for run in runs if (run.level, run.server) == (i, s)]
            if not mine:
                continue
            found = [summarize(r.loaded, objective=objective, price_per_hour=price_per_hour) for r in mine]
            by_round[i, s] = dict(zip((r.round for r in mine), found, strict=True))
            rows.append(
                Row(
                    server, s, level.label, i, found, [r.loaded for r in mine], over_rounds(found), _all_problems(found)
                )
            )
    comparisons = []
    for i, level in enumerate(plan.levels):
        first, second = by_round.get((i, 0), {}), by_round.get((i, 1), {})
        both = sorted(first.keys() & second.keys())
        if both:
            comparisons.append(Comparison(level.label, ratios([first[r] for r in both], [second[r] for r in both])))
    return Results(
        began=began,
        command=command,
        plan=plan,
        servers=servers,
        rows=rows,
        comparisons=comparisons,
        objective=objective,
        price_per_hour=price_per_hour,
        is_whole=is_whole,
        remarks=_remarks(rows, servers, is_whole=is_whole),
    )


def _all_problems(runs: Sequence[Summary]) -> dict[str, Problem]:
    together: dict[str, Problem] = {}
    for run in runs:
        for kind, problem in run.problems.items():
            old = together.get(kind, Problem(0, problem.message, None))
            waits = [w for w in (old.max_retry_after_s, problem.max_retry_after_s) if w is not None]
            together[kind] = Problem(old.num + problem.num, old.message, max(waits, default=None))
    return dict(sorted(together.items(), key=lambda item: -item[1].num))


def _remarks(rows: Sequence[Row], servers: Sequence[Server], *, is_whole: bool) -> list[str]:
    """What a reader must know before trusting the numbers."""
    remarks = (
        [] if is_whole else ["The benchmark was stopped before its end: these are the requests that had ended by then."]
    )
    several = len(servers) > 1
    for server in servers:
        remarks += [f"{server.name}: {note}" if several else note for note in server.notes]
    for row in rows:
        where = f"{row.label}, {row.server.name}" if several else row.label
        remarks += [f"{where}: {text}" for text in _remarks_of(row)]
    return remarks


def _remarks_of(row: Row) -> list[str]:
    remarks = []
    for kind, problem in row.problems.items():
        wait = problem.max_retry_after_s
        asked = "" if wait is None else f" It asked to wait up to {wait:g} s."
        num = f"{problem.num} request{'s' * (problem.num != 1)}"
        remarks.append(f"{num} failed: {kind} ({problem.message.rstrip('.')}).{asked}")
    num_short = sum(r.num_short for r in row.runs)
    if num_short:
        remarks.append(f"{num_short} of {row.num_ok} answers are shorter than asked for.")
    num_tokens, num_events = sum(r.num_output_tokens for r in row.runs), sum(r.num_events for r in row.runs)
    if num_tokens > 1.02 * num_events > 0:
        remarks.append(
            f"{num_tokens:,} tokens came in {num_events:,} events, so a gap is often that of several tokens; "
            "the time per token after the first is not."
        )
    num_joined = sum(r.num_joined for r in row.runs)
    if num_joined > JOINED_SHARE * num_events:
        remarks.append(
            f"{num_joined / num_events:.0%} of the events came in one piece with the event before them, so their gaps are 0; "
            "the time per token after the first is not affected."
        )
    late_ms = max((r.sent_late_p99_ms for r in row.runs), default=0.0)
    if late_ms > 10:
        remarks.append(
            f"1% of the requests were sent more than {late_ms:.0f} ms after their time; their clocks began at their time."
        )
    num_cut, num_left = sum(r.num_cut for r in row.runs), sum(r.num_left for r in row.runs)
    if num_cut or num_left:
        remarks.append(
            f"At the end of its time, {num_cut:,} requests were still running, and {num_left:,} had not been sent."
        )
    gap = row.metrics.get("mean_gap_p50")  # a gap itself may be 0
    warnings = [own_cost.warning(load.cost, gap_s=None if gap is None else gap.median / 1e3) for load in row.loads]
    return remarks + [w for w in warnings if w][:1]
