"""What an evaluation found, as values, as tables for the terminal and as JSON. Knows scores; asks nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.table import Table

from cluster.eval.journal import Answer
from cluster.eval.scores import Difference, Mean, MeanDifference, Share, compare, compare_scores, share
from cluster.terminal.tables import plain_table

NONE = "–"


@dataclass(frozen=True, kw_only=True)
class Prices:
    """USD for a million tokens; None where they are not known."""

    prompt: float | None = None
    output: float | None = None

    def of(self, prompt_tokens: int, output_tokens: int) -> float | None:
        if self.prompt is None and self.output is None:
            return None
        return (prompt_tokens * (self.prompt or 0.0) + output_tokens * (self.output or 0.0)) / 1e6


@dataclass(frozen=True, kw_only=True)
class SuiteResult:
    """share: how many passed, or the mean or whole value of what is neither right nor wrong; None for a total of such suites only.

    requests_per_s: of one request at a time: the inverse of the mean time of an answer.
    """

    share: Share | Mean | None
    num_items: int
    num_errors: int
    prompt_tokens: int
    output_tokens: int
    requests_per_s: float | None
    cost_usd: float | None


@dataclass(frozen=True, kw_only=True)
class ModelResult:
    """suites: by name; total: over all of them. against: the paired comparison with the baseline, by suite and "total".

    more: further numbers that a suite came with, by suite.
    """

    name: str
    suites: Mapping[str, SuiteResult]
    total: SuiteResult
    against: Mapping[str, Difference | MeanDifference] = field(default_factory=dict)
    answers: Sequence[Answer] = ()
    more: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Report:
    """models: the one that is evaluated, then its baseline. is_whole: False after an interruption."""

    models: Sequence[ModelResult]
    is_whole: bool
    command: str
    began: str


def suite_of(answer: Answer) -> str:
    return answer.item.partition("/")[0]


def result_of(
    name: str,
    answers: Sequence[Answer],
    prices: Prices,
    *,
    baseline: Sequence[Answer] = (),
    means: Mapping[str, Mean] | None = None,
    more: Mapping[str, Mapping[str, Any]] | None = None,
) -> ModelResult:
    """means: of the suites whose answers are neither right nor wrong."""
    means = means or {}
    groups: dict[str, list[Answer]] = {}
    for answer in answers:
        groups.setdefault(suite_of(answer), []).append(answer)
    judged = [a for a in answers if suite_of(a) not in means]
    against: dict[str, Difference | MeanDifference] = {}
    if baseline:
        others = {a.item: a.passed for a in baseline}
        scores = {a.item: a.score for a in baseline if a.score is not None}
        for suite, group in [*groups.items(), ("total", judged)]:
            if suite not in means and group:
                against[suite] = compare({a.item: a.passed for a in group}, others)
            elif mine := {a.item: a.score for a in group if a.score is not None and a.item in scores}:
                against[suite] = compare_scores(mine, scores)
    return ModelResult(
        name=name,
        suites={suite: _summary(group, prices, means.get(suite) or _share(group)) for suite, group in groups.items()},
        total=_summary(answers, prices, _share(judged) if judged else None),
        against=against,
        answers=answers,
        more=more or {},
    )


def _share(answers: Sequence[Answer]) -> Share:
    return share([a.passed for a in answers])


def _summary(answers: Sequence[Answer], prices: Prices, found: Share | Mean | None) -> SuiteResult:
    timed = [a.seconds for a in answers if a.error is None and a.output_tokens]
    num_prompt, num_output = sum(a.prompt_tokens for a in answers), sum(a.output_tokens for a in answers)
    return SuiteResult(
        share=found,
        num_items=len(answers),
        num_errors=sum(a.error is not None for a in answers),
        prompt_tokens=num_prompt,
        output_tokens=num_output,
        requests_per_s=len(timed) / sum(timed) if sum(timed) else None,
        cost_usd=prices.of(num_prompt, num_output),
    )


def percent(value: Share | Mean | None) -> str:
    """ "90% (70% to 97%)"; a mean as a plain number."""
    if value is None:
        return NONE
    if isinstance(value, Share):
        low, high = value.interval
        return f"{value.value:.0%} ({low:.0%} to {high:.0%})"
    interval = value.interval
    return f"{value.value:.4g}" + ("" if interval is None else f" ({interval[0]:.4g} to {interval[1]:.4g})")


def money(value: float | None) -> str:
    return NONE if value is None else f"{value:.4f}"


def speed(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}"


def table(report: Report) -> Table:
    """One row for each model: its share in each suite with the 95 % interval, cost and speed."""
    found = plain_table()
    suites = list(report.models[0].suites)
    found.add_column("Model")
    for title in (*suites, "Total", "Cost USD", "Speed rps"):
        found.add_column(title, justify="right")
    for model in report.models:
        shares = [percent(model.suites[name].share) if name in model.suites else NONE for name in suites]
        total = model.total
        found.add_row(model.name, *shares, percent(total.share), money(total.cost_usd), speed(total.requests_per_s))
    return found


def details(report: Report) -> list[tuple[str, ...]]:
    """Head and rows: what each suite took on each model."""
    rows: list[tuple[str, ...]] = [
        ("Suite", "Model", "Items", "Errors", "Prompt tokens", "Answer tokens", "Cost USD", "Speed rps")
    ]
    for suite in report.models[0].suites:
        for model in report.models:
            if (result := model.suites.get(suite)) is not None:
                tokens = f"{result.prompt_tokens:,}", f"{result.output_tokens:,}"
                last = money(result.cost_usd), speed(result.requests_per_s)
                rows.append((suite, model.name, str(result.num_items), str(result.num_errors), *tokens, *last))
    return rows


def details_table(report: Report) -> Table:
    head, *rows = details(report)
    found = plain_table()
    for title in head:
        found.add_column(title, justify="left" if title in ("Suite", "Model") else "right")
    for row in rows:
        found.add_row(*row)
    return found


def verdicts(report: Report) -> list[str]:
    """One sentence for each comparison with the baseline."""
    if len(report.models) < 2:
        return []
    model, baseline = report.models[:2]
    sentences = []
    for suite, difference in model.against.items():
        measured = model.suites[suite].share if suite in model.suites else model.total.share
        is_more_better = not isinstance(measured, Mean) or measured.is_more_better
        is_share = isinstance(difference, Difference)
        form, unit, factor = ("+.0f", " points", 100) if is_share else ("+.4g", "", 1)
        value, low, high = (f"{factor * number:{form}}" for number in (difference.value, *difference.interval))
        alone = "alone passed" if is_share else "scored higher on"
        p = "p < 0.001" if difference.p_value < 0.001 else f"p = {difference.p_value:.3f}"
        sentences.append(
            f"{suite}: {model.name} is {verdict(difference, is_more_better=is_more_better)} {baseline.name}: "
            f"{value}{unit} ({low} to {high}), {p}. "
            f"{model.name} {alone} {difference.better} item{'s' * (difference.better != 1)}, {baseline.name} {difference.worse}."
        )
    return sentences


def verdict(difference: Difference | MeanDifference, *, is_more_better: bool = True) -> str:
    if difference.p_value >= 0.05:
        return "not clearly different from"
    return "better than" if (difference.value > 0) == is_more_better else "worse than"


def as_json(report: Report) -> dict[str, Any]:
    """Numbers and all answers."""
    return {
        "command": report.command,
        "began": report.began,
        "is_whole": report.is_whole,
        "models": [
            {
                "name": model.name,
                "total": _plain(model.total),
                "suites": {name: _plain(result) for name, result in model.suites.items()},
                "against_baseline": {name: _difference(d) for name, d in model.against.items()},
                "more": model.more,
                "answers": [
                    {f: getattr(a, f) for f in ("item", "passed", "score", "text", "error", "seconds", "output_tokens")}
                    for a in model.answers
                ],
            }
            for model in report.models
        ],
    }


def _plain(result: SuiteResult) -> dict[str, Any]:
    """`share` has passed, total, value, low and high; a mean has value, error, total, is_more_better, low and high."""
    values = asdict(result)
    if result.share is not None:
        low, high = result.share.interval or (None, None)
        values["share"] |= {"value": result.share.value, "low": low, "high": high}
    return values


def _difference(difference: Difference | MeanDifference) -> dict[str, Any]:
    low, high = difference.interval
    return {**asdict(difference), "value": difference.value, "low": low, "high": high, "p_value": difference.p_value}
