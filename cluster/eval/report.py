"""What an evaluation found, as values, as a table for the terminal and as JSON. Knows scores; asks nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.table import Table

from cluster.eval.journal import Answer
from cluster.eval.scores import Difference, Share, compare, share
from cluster.terminal.tables import plain_table


@dataclass(frozen=True, kw_only=True)
class Prices:
    """USD for a million tokens; None where they are not known."""

    prompt: float | None = None
    output: float | None = None

    def of(self, answers: Sequence[Answer]) -> float | None:
        if self.prompt is None and self.output is None:
            return None
        prompts, outputs = (sum(getattr(a, name) for a in answers) for name in ("prompt_tokens", "output_tokens"))
        return (prompts * (self.prompt or 0.0) + outputs * (self.output or 0.0)) / 1e6


@dataclass(frozen=True, kw_only=True)
class SuiteResult:
    """requests_per_s: of one request at a time: the inverse of the mean time of an answer."""

    share: Share
    num_errors: int
    prompt_tokens: int
    output_tokens: int
    requests_per_s: float | None
    cost_usd: float | None


@dataclass(frozen=True, kw_only=True)
class ModelResult:
    """suites: by name; total: over all of them. against: the paired comparison with the baseline, by suite and "total"."""

    name: str
    suites: Mapping[str, SuiteResult]
    total: SuiteResult
    against: Mapping[str, Difference] = field(default_factory=dict)
    answers: Sequence[Answer] = ()


@dataclass(frozen=True, kw_only=True)
class Report:
    """models: the one that is evaluated, then its baseline. is_whole: False after an interruption."""

    models: Sequence[ModelResult]
    is_whole: bool
    command: str
    began: str


def suite_of(answer: Answer) -> str:
    return answer.item.partition("/")[0]


def result_of(name: str, answers: Sequence[Answer], prices: Prices, *, baseline: Sequence[Answer] = ()) -> ModelResult:
    names = list(dict.fromkeys(map(suite_of, answers)))
    groups = {suite: [a for a in answers if suite_of(a) == suite] for suite in names}
    others = {a.item: a.passed for a in baseline}
    against = {
        suite: compare({a.item: a.passed for a in group}, others)
        for suite, group in [*groups.items(), ("total", list(answers))]
        if baseline
    }
    return ModelResult(
        name=name,
        suites={suite: _summary(group, prices) for suite, group in groups.items()},
        total=_summary(answers, prices),
        against=against,
        answers=answers,
    )


def _summary(answers: Sequence[Answer], prices: Prices) -> SuiteResult:
    timed = [a.seconds for a in answers if a.error is None and a.output_tokens]
    return SuiteResult(
        share=share([a.passed for a in answers]),
        num_errors=sum(a.error is not None for a in answers),
        prompt_tokens=sum(a.prompt_tokens for a in answers),
        output_tokens=sum(a.output_tokens for a in answers),
        requests_per_s=len(timed) / sum(timed) if sum(timed) else None,
        cost_usd=prices.of(answers),
    )


def percent(value: Share) -> str:
    low, high = value.interval
    return f"{value.value:.0%} ({low:.0%} to {high:.0%})"


def table(report: Report) -> Table:
    """One row for each model: its share in each suite with the 95 % interval, cost and speed."""
    found = plain_table()
    suites = list(report.models[0].suites)
    found.add_column("Model")
    for title in (*suites, "Total", "Cost USD", "Speed rps"):
        found.add_column(title, justify="right")
    for model in report.models:
        shares = [percent(model.suites[name].share) if name in model.suites else "–" for name in suites]
        cost, speed = model.total.cost_usd, model.total.requests_per_s
        found.add_row(
            model.name,
            *shares,
            percent(model.total.share),
            "–" if cost is None else f"{cost:.4f}",
            "–" if speed is None else f"{speed:.2f}",
        )
    return found


def verdicts(report: Report) -> list[str]:
    """One sentence for each comparison with the baseline."""
    if len(report.models) < 2:
        return []
    model, baseline = report.models[:2]
    return [
        f"{suite}: {model.name} is {verdict(difference)} {baseline.name}: {difference.value:+.0%} "
        f"({difference.interval[0]:+.0%} to {difference.interval[1]:+.0%}), p = {difference.p_value:.3f}, "
        f"{difference.better} items only it passed, {difference.worse} only the other."
        for suite, difference in model.against.items()
    ]


def verdict(difference: Difference) -> str:
    if difference.p_value >= 0.05:
        return "not clearly different from"
    return "better than" if difference.better > difference.worse else "worse than"


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
                "answers": [
                    {f: getattr(a, f) for f in ("item", "passed", "text", "error", "seconds", "output_tokens")}
                    for a in model.answers
                ],
            }
            for model in report.models
        ],
    }


def _plain(result: SuiteResult) -> dict[str, Any]:
    values = asdict(result)
    low, high = result.share.interval
    values["share"] |= {"value": result.share.value, "low": low, "high": high}
    return values


def _difference(difference: Difference) -> dict[str, Any]:
    low, high = difference.interval
    return {**asdict(difference), "value": difference.value, "low": low, "high": high, "p_value": difference.p_value}
