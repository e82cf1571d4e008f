"""Reports: numbers of given answers, the comparison in words, and a page that shows them."""

import json
import xml.etree.ElementTree as ElementTree

import pytest

from cluster.eval.journal import Answer
from cluster.eval.page import page
from cluster.eval.report import Prices, Report, as_json, result_of, table, verdicts


def answers(model, passed, suite="docs"):
    return [
        Answer(key=f"{model}{i}", model=model, item=f"{suite}/{i}", text=f"<b>{i}</b>", passed=bool(ok), prompt_tokens=100,
               output_tokens=10, seconds=0.5)
        for i, ok in enumerate(passed)
    ]  # fmt: skip


@pytest.fixture
def report():
    first = answers("new", [1] * 18 + [0] * 2)
    second = answers("old", [1] * 6 + [0] * 14)
    prices = Prices(prompt=1.0, output=2.0)
    models = [result_of("new", first, prices, baseline=second), result_of("old", second, prices)]
    return Report(models=models, is_whole=True, command="tramontane eval", began="2026-01-01")


def test_numbers(report):
    new = report.models[0]
    assert (new.total.share.passed, new.total.share.total) == (18, 20)
    assert new.total.cost_usd == pytest.approx((20 * 100 * 1.0 + 20 * 10 * 2.0) / 1e6)
    assert new.total.requests_per_s == pytest.approx(2.0)
    assert (new.against["docs"].better, new.against["docs"].worse) == (12, 0)


def test_the_comparison_in_words(report):
    (docs, total) = verdicts(report)
    assert docs.startswith("docs: new is better than old: +60 points (+")
    assert docs.endswith("p < 0.001. new alone passed 12 items, old 0.")
    assert total.startswith("total: new is better than old")
    equal = Report(
        models=[result_of("a", answers("a", [1, 0]), Prices(), baseline=answers("b", [0, 1])), report.models[1]],
        is_whole=True,
        command="",
        began="",
    )
    assert "not clearly different" in verdicts(equal)[0]


def test_the_table_has_the_columns(report):
    found = table(report)
    assert [column.header for column in found.columns] == ["Model", "docs", "Total", "Cost USD", "Speed rps"]
    assert next(iter(found.columns[1].cells)) == "90% (70% to 97%)"


def test_json_and_page(report):
    data = json.loads(json.dumps(as_json(report)))
    assert data["models"][0]["suites"]["docs"]["share"]["passed"] == 18
    assert data["models"][0]["against_baseline"]["total"]["p_value"] < 0.001
    html = page(report)
    assert "<b>0</b>" not in html, "answers are text"
    start, end = html.index("<svg"), html.index("</svg>") + len("</svg>")
    bars = ElementTree.fromstring(html[start:end]).findall("{http://www.w3.org/2000/svg}rect")
    assert len(bars) == 4, "two models, one suite and the total"
    assert "http" not in html.replace("http://www.w3.org/2000/svg", ""), "it loads nothing"
