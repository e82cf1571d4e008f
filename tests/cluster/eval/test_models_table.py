"""The table of models: rows of saved results, their speed and cost, and the three forms in which it is written."""

import msgspec
import pytest

from cluster.eval.journal import Answer
from cluster.eval.models_table import SavedBench, SavedReport, as_json, cells, markdown, page, put_together
from cluster.eval.report import Prices, Report, result_of
from cluster.eval.report import as_json as report_json
from cluster.eval.scores import Mean
from workers.errors import ConfigError

NO_PRICES = Prices()


def saved(
    name, *, passed=8, errors=0, suites=("reasoning", "code", "mine"), prices=NO_PRICES, means=None
) -> SavedReport:
    """Ten questions of each suite, each of 90 + 10 tokens in half a second: as `eval` writes it."""
    answers = [
        Answer(key=f"{s}{i}", model=name, item=f"{s}/{i}", passed=i < passed, prompt_tokens=90, output_tokens=10, seconds=0.5,
               error="gone" if i >= 10 - errors else None)
        for s in suites for i in range(10)
    ]  # fmt: skip
    result = result_of(name, answers, prices, means=means)
    report = Report(models=[result], is_whole=True, command="", began="")
    return msgspec.json.decode(msgspec.json.encode(report_json(report)), type=SavedReport)


def bench(model: str, *rates: float) -> SavedBench:
    levels = [
        {"level": f"{n} streams", "server": 0, "metrics": {"requests_per_s": {"median": rate}}}
        for n, rate in enumerate(rates, 1)
    ]
    return msgspec.convert({"servers": [{"model": model}], "levels": levels}, SavedBench)


def test_columns_are_those_of_the_page_then_the_others():
    table = put_together([(None, saved("a")), ("b", saved("a", passed=5))], [], prices=NO_PRICES)
    head, a, b = cells(table)
    assert head == ("Model", "Code", "Reasoning", "mine", "Cost USD", "Speed rps")
    assert a == ("a", *["80% (49 to 94)"] * 3, "–", "2.00")
    assert b[:2] == ("b", "50% (24 to 76)")
    assert table.notes[-1].startswith("Speed: the inverse")


def test_speed_of_a_benchmark_and_cost_of_a_machine():
    reports = [(None, saved("a")), ("b", saved("a"))]
    table = put_together(reports, [("b", bench("a", 3.0, 5.0, 4.0))], prices=NO_PRICES, price_per_hour=3.6)
    a, b = table.rows
    assert (a.requests_per_s, a.load) == (2.0, None)
    assert (b.requests_per_s, b.load) == (5.0, "2 streams")
    assert b.cost_usd == pytest.approx(30 / 5 / 3600 * 3.6)
    assert a.cost_usd == pytest.approx(30 / 2 / 3600 * 3.6)
    assert any("30 questions at this speed, on a machine for 3.6 USD" in note for note in table.notes)


def test_cost_of_tokens():
    priced = saved("a", prices=Prices(prompt=1.0))
    (row,) = put_together([(None, priced)], [], prices=NO_PRICES).rows
    assert row.cost_usd == pytest.approx(30 * 90 / 1e6)
    (row,) = put_together([(None, priced)], [], prices=Prices(output=2.0)).rows
    assert row.cost_usd == pytest.approx(30 * 10 * 2 / 1e6), "prices now are instead of those then"


def test_three_forms():
    means = {"mine": Mean(12.5, 0.5, 10, is_more_better=False)}
    table = put_together([("a | b", saved("a", errors=1, means=means))], [], prices=NO_PRICES)
    text = markdown(table)
    assert "| a \\| b | 80% (49 to 94) | 80% (49 to 94) | 12.5 (11.52 to 13.48) |" in text
    assert "3 questions have an error" in text
    (model,) = as_json(table)["models"]
    assert (model["name"], model["suites"]["mine"]["value"], model["total"]["num_items"]) == ("a | b", 12.5, 30)
    html = page(table)
    assert html.count("<rect") == 2, "a mean has no bar"
    assert "http" not in html.replace("http://www.w3.org/2000/svg", ""), "it loads nothing"


@pytest.mark.parametrize(
    ("reports", "benches", "message"),
    [
        ([(None, "a"), (None, "a")], [], "Two rows have the name 'a'"),
        ([(None, "a")], [(None, "b")], "'b', of which --report has no row"),
        ([(None, "a")], [(None, "a"), ("a", "b")], "Two benchmarks are of 'a'"),
    ],
)
def test_names_that_do_not_fit(reports, benches, message):
    with pytest.raises(ConfigError, match=message):
        put_together(
            [(label, saved(name)) for label, name in reports],
            [(label, bench(name, 1.0)) for label, name in benches],
            prices=NO_PRICES,
        )
