"""An evaluation as one HTML page that needs nothing else: the table, a plot of the shares with their intervals, and every answer."""

from collections.abc import Iterator, Sequence
from html import escape

from cluster.eval.journal import Answer
from cluster.eval.report import Report, percent, verdicts

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1180px; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; } th, td { padding: .25rem .7rem; border-bottom: 1px solid #8885; }
th, td { text-align: right; vertical-align: top; }
th:first-child, td:first-child, td.text { text-align: left; }
td.text { white-space: pre-wrap; overflow-wrap: anywhere; max-width: 42rem; }
.scroll { overflow-x: auto; } .failed { color: #c0392b; } .passed { color: #1e8449; } svg { max-width: 100%; height: auto; }
"""
_COLORS = ("#2a6fbb", "#d9822b", "#3a9d5d", "#8e44ad")
_LEFT, _WIDTH, _ROW, _BAR = 150, 560, 18, 11


def page(report: Report) -> str:
    title = f"Evaluation of {report.models[0].name}"
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body><h1>{escape(title)}</h1>",
        f"<p>{escape(report.began)}<br><code>{escape(report.command)}</code></p>",
        "" if report.is_whole else "<p><b>Interrupted: not every item was asked.</b></p>",
        '<div class="scroll">',
        *_table(report),
        "</div>",
        *(f"<p>{escape(sentence)}</p>" for sentence in verdicts(report)),
        f"<h2>Shares and their 95&nbsp;% intervals</h2>{_plot(report)}",
    ]
    for model in report.models:
        parts += [f"<h2>Answers of {escape(model.name)}</h2><div class='scroll'><table>", *_answers(model.answers)]
        parts.append("</table></div>")
    return "\n".join([*parts, "</body></html>\n"])


def _table(report: Report) -> Iterator[str]:
    suites = list(report.models[0].suites)
    heads = ("Model", *suites, "Total", "Cost USD", "Speed rps", "Errors")
    yield f"<table><tr>{''.join(f'<th>{escape(head)}</th>' for head in heads)}</tr>"
    for model in report.models:
        shares = [percent(model.suites[name].share) if name in model.suites else "–" for name in suites]
        cost, speed = model.total.cost_usd, model.total.requests_per_s
        cells = (
            *(model.name, *shares, percent(model.total.share)),
            *("–" if cost is None else f"{cost:.4f}", "–" if speed is None else f"{speed:.2f}"),
            str(model.total.num_errors),
        )
        yield f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"
    yield "</table>"


def _plot(report: Report) -> str:
    """Bars from 0 to 100 %, grouped by suite, each with the whisker of its interval."""
    groups = [*report.models[0].suites, "total"]
    height = len(groups) * (len(report.models) * _ROW + 12) + 24
    shapes = []
    for tick in range(0, 101, 25):
        x = _LEFT + _WIDTH * tick / 100
        shapes.append(f'<line x1="{x}" y1="0" x2="{x}" y2="{height - 20}" stroke="#8885"/>')
        shapes.append(
            f'<text x="{x}" y="{height - 6}" text-anchor="middle" font-size="11" fill="currentColor">{tick} %</text>'
        )
    y = 4
    for group in groups:
        middle = y + len(report.models) * _ROW / 2 + 4
        shapes.append(
            f'<text x="{_LEFT - 8}" y="{middle}" text-anchor="end" font-size="12" fill="currentColor">{escape(group)}</text>'
        )
        for color, model in zip(_COLORS, report.models, strict=False):
            result = model.total if group == "total" else model.suites.get(group)
            if result is not None:
                low, high = result.share.interval
                shapes.append(
                    f'<rect x="{_LEFT}" y="{y}" width="{_WIDTH * result.share.value:.1f}" height="{_BAR}" fill="{color}">'
                    f"<title>{escape(model.name)}: {percent(result.share)}</title></rect>"
                    f'<line x1="{_LEFT + _WIDTH * low:.1f}" y1="{y + _BAR / 2}" x2="{_LEFT + _WIDTH * high:.1f}" '
                    f'y2="{y + _BAR / 2}" stroke="currentColor" stroke-width="1.5"/>'
                )
            y += _ROW
        y += 12
    legend = " ".join(
        f'<span style="color:{color}">■</span> {escape(model.name)}'
        for color, model in zip(_COLORS, report.models, strict=False)
    )
    size = f'viewBox="0 0 {_LEFT + _WIDTH + 30} {height}" width="{_LEFT + _WIDTH + 30}"'
    return f'<p>{legend}</p><svg xmlns="http://www.w3.org/2000/svg" {size} role="img">{"".join(shapes)}</svg>'


def _answers(answers: Sequence[Answer]) -> Iterator[str]:
    yield "<tr><th>Item</th><th></th><th>Seconds</th><th>Answer</th></tr>"
    for answer in answers:
        word = "passed" if answer.passed else "failed"
        text = answer.text if answer.error is None else f"error: {answer.error}"
        yield (
            f'<tr><td>{escape(answer.item)}</td><td class="{word}">{word}</td><td>{answer.seconds:.2f}</td>'
            f'<td class="text">{escape(text)}</td></tr>'
        )
