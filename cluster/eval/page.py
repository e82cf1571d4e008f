"""An evaluation as one HTML page that needs nothing else: the table, a plot of the shares with their intervals, and every answer."""

from collections.abc import Iterator, Sequence
from html import escape

from cluster.eval.journal import Answer
from cluster.eval.plot import Bar, bars
from cluster.eval.report import NONE, ModelResult, Report, details, money, percent, speed, verdicts
from cluster.eval.scores import Share

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1180px; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; } th, td { padding: .25rem .7rem; border-bottom: 1px solid #8885; }
th, td { text-align: right; vertical-align: top; }
th:first-child, td:first-child, th.text, td.text { text-align: left; }
td.text { white-space: pre-wrap; overflow-wrap: anywhere; max-width: 42rem; }
.scroll { overflow-x: auto; } .failed { color: #c0392b; } .passed { color: #1e8449; } svg { max-width: 100%; height: auto; }
"""


def page(report: Report) -> str:
    title = f"Evaluation of {report.models[0].name}"
    parts = [
        head(title),
        f"<p>{escape(report.began)}<br><code>{escape(report.command)}</code></p>",
        "" if report.is_whole else "<p><b>Interrupted: not every item was asked.</b></p>",
        *rows(_table(report)),
        *(f"<p>{escape(sentence)}</p>" for sentence in verdicts(report)),
        f"<h2>Shares and their 95&nbsp;% intervals</h2>{_plot(report)}",
        "<h2>Cost and speed of each suite</h2>",
        *rows(details(report)),
    ]
    for model in report.models:
        parts += [f"<h2>Answers of {escape(model.name)}</h2><div class='scroll'><table>", *_answers(model.answers)]
        parts.append("</table></div>")
    return "\n".join([*parts, "</body></html>\n"])


def head(title: str) -> str:
    """A page up to its title as the first heading."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body><h1>{escape(title)}</h1>"
    )


def rows(cells: Sequence[Sequence[str]]) -> Iterator[str]:
    """A table whose first row is the head."""
    yield '<div class="scroll"><table>'
    for tag, row in zip(["th", *["td"] * (len(cells) - 1)], cells, strict=True):
        yield f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in row)}</tr>"
    yield "</table></div>"


def _table(report: Report) -> list[tuple[str, ...]]:
    suites = list(report.models[0].suites)

    def row(model: ModelResult) -> tuple[str, ...]:
        total = model.total
        shares = (percent(model.suites[name].share) if name in model.suites else NONE for name in suites)
        last = (money(total.cost_usd), speed(total.requests_per_s), str(total.num_errors))
        return (model.name, *shares, percent(total.share), *last)

    return [("Model", *suites, "Total", "Cost USD", "Speed rps", "Errors"), *map(row, report.models)]


def _plot(report: Report) -> str:
    models = [
        (
            model.name,
            {
                name: Bar(result.share.value, *result.share.interval, percent(result.share))
                for name, result in [*model.suites.items(), ("total", model.total)]
                if isinstance(result.share, Share)
            },
        )
        for model in report.models
    ]
    return bars(list(models[0][1]), models)


def _answers(answers: Sequence[Answer]) -> Iterator[str]:
    yield "<tr><th>Item</th><th></th><th>Seconds</th><th class='text'>Answer</th></tr>"
    for answer in answers:
        word = "passed" if answer.passed else "failed"
        kind, shown = (word, word) if answer.score is None else ("score", f"{answer.score:.3g}")
        text = answer.text if answer.error is None else f"error: {answer.error}"
        yield (
            f'<tr><td>{escape(answer.item)}</td><td class="{kind}">{shown}</td><td>{answer.seconds:.2f}</td>'
            f'<td class="text">{escape(text)}</td></tr>'
        )
