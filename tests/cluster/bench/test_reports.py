"""The reports: what a table, JSON, a page and plots show of known results."""

import json
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from cluster.bench.exchange import Failure, Outcome
from cluster.bench.lengths import parse_lengths
from cluster.bench.load import Loaded
from cluster.bench.objective import parse_objective
from cluster.bench.own_cost import OwnCost
from cluster.bench.probe import Server
from cluster.bench.prompts import Prompts
from cluster.bench.report.charts import charts
from cluster.bench.report.json_file import as_json
from cluster.bench.report.page import page
from cluster.bench.report.results import Results, put_together
from cluster.bench.report.svg import log_ticks, svg, ticks
from cluster.bench.report.table import number, spread, tables, verdict
from cluster.bench.rounds import Plan, Run
from cluster.bench.statistics import Spread
from cluster.bench.workload import Shape, closed_level


def server(name: str, *notes: str) -> Server:
    return Server(
        name=name,
        model="<m>",
        endpoint="completions",
        prompts=Prompts((1, 2)),
        ignore_eos=True,
        include_usage=True,
        fields={},
        notes=notes,
    )


def loaded(gap_ms: float, *failures: Failure, num: int = 4) -> Loaded:
    outcomes = [
        Outcome(
            0.0, 0.0, 5, [0.1 + i * gap_ms / 1e3 for i in range(5)], 1.0, num_prompt=10, num_output=5, has_usage=True
        )
        for _ in range(num)
    ]
    outcomes += [Outcome(0.0, 0.0, 5, failure=failure) for failure in failures]
    return Loaded(outcomes, began_s=0.0, ended_s=2.0, cost=OwnCost(cpu_s=0.2, wall_s=2.0))


def results(*, gaps_ms: tuple[tuple[float, float], ...] = ((10, 20), (11, 22)), is_whole: bool = True) -> Results:
    """Two servers, two levels, a round for each pair of gaps."""
    levels = (closed_level(1, num_requests=4), closed_level(8, num_requests=4))
    shape = Shape(prompt=parse_lengths("10"), output=parse_lengths("5"))
    plan = Plan(levels=levels, shape=shape, num_rounds=len(gaps_ms), seed=7)
    busy = Failure("HTTP 429", "too many requests", 3.0)
    runs = [
        Run(s, level, round_, loaded(gap, *([busy] if level == 1 else [])))
        for round_, pair in enumerate(gaps_ms)
        for level in range(2)
        for s, gap in enumerate(pair)
    ]
    return put_together(
        runs,
        plan=plan,
        servers=[server("http://a", "It takes no ids."), server("http://b<&>")],
        objective=parse_objective("gap=15ms"),
        price_per_hour=1.0,
        began="2026-01-01T00:00:00+00:00",
        command="tramontane bench",
        is_whole=is_whole,
    )


def printed(found: Results) -> str:
    console = Console(width=220, file=None, record=True, markup=False, highlight=False, quiet=False)
    with console.capture() as capture:
        console.print(tables(found))
    return capture.get()


def test_the_table_has_a_row_for_each_level_and_server_and_says_what_failed() -> None:
    text = printed(results())
    (row,) = [line for line in text.splitlines() if line.startswith("8 streams http://b<&>")]
    assert re.search(r"8 +2 +100 / 100 / 100 +21\.0 / 21\.0 / 21\.0", row)
    assert "10.0 " in row  # tokens/s: 20 in 2 s
    assert "0.00 (0%)" in row
    assert "8 streams, http://a: 2 requests failed: HTTP 429 (too many requests). It asked to wait up to 3 s." in text
    assert "http://a: It takes no ids." in text


def test_a_comparison_says_which_is_better_only_if_all_rounds_agree() -> None:
    clear = results(gaps_ms=((10, 20), (10, 25)))
    assert re.search(r"gap between tokens p50 +2\.25 \[2\.00 to 2\.50\] +worse", printed(clear))
    mixed = results(gaps_ms=((10, 9), (10, 12)))
    assert re.search(r"gap between tokens p50 +1\.05 \[0\.90 to 1\.20\] +no clear difference", printed(mixed))


@pytest.mark.parametrize(
    ("name", "low", "high", "word"),
    [
        ("tokens_per_s", 1.1, 1.2, "better"),
        ("tokens_per_s", 0.8, 0.9, "worse"),
        ("ttft_p50", 0.8, 0.9, "better"),
        ("ttft_p50", 0.8, 1.1, "no clear difference"),
        ("ttft_p50", 0.8, 0.8, ""),  # one round decides nothing
    ],
)
def test_verdicts(name: str, low: float, high: float, word: str) -> None:
    assert verdict(name, Spread((low + high) / 2, low, high)) == word


def test_numbers_have_three_digits_that_count() -> None:
    assert [number(v) for v in (0, 0.0123, 0.5, 1.234, 12.34, 123.4, 12345.6)] == [
        "0.00", "0.012", "0.50", "1.23", "12.3", "123", "12,346",
    ]  # fmt: skip
    assert spread(Spread(2, 1, 3)) == "2.00 [1.00 to 3.00]"
    assert spread(None) == "–"


def test_json_has_every_round_and_requests_only_if_asked() -> None:
    found = json.loads(as_json(results()))
    assert (found["form"], found["complete"], found["seed"]) == (1, True, 7)
    level = found["levels"][3]
    assert (level["level"], level["server"], level["ok"], level["failed"]) == ("8 streams", 1, 8, 2)
    assert [r["metrics"]["gap_p50"] for r in level["rounds"]] == pytest.approx([20, 22])
    assert level["metrics"]["gap_p50"]["median"] == pytest.approx(21)
    assert level["problems"]["HTTP 429"] == {"num": 2, "message": "too many requests", "max_retry_after_s": 3.0}
    assert found["ratios"][0]["metrics"]["gap_p50"]["median"] == pytest.approx(2)
    assert "requests" not in level["rounds"][0]
    requests = json.loads(as_json(results(), with_requests=True))["levels"][3]["rounds"][0]["requests"]
    assert requests[0]["events_s"] == pytest.approx([0.1, 0.12, 0.14, 0.16, 0.18])
    assert requests[4]["failure"]["kind"] == "HTTP 429"


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_loads_nothing_and_escapes_names() -> None:
    html = page(results())
    parsed = Page()
    parsed.feed(html)
    assert not [t for t, attributes in parsed.tags if t in ("script", "link", "img", "iframe") or "src" in attributes]
    assert "url(" not in html
    assert "@import" not in html
    assert "http://b<&>" in parsed.text
    assert "<m>" in parsed.text
    assert sum(tag == "svg" for tag, _ in parsed.tags) == len(charts(results())) >= 5


def test_a_benchmark_that_was_stopped_says_so_everywhere() -> None:
    stopped = results(is_whole=False)
    words = "The benchmark was stopped before its end"
    assert words in printed(stopped)
    assert words in page(stopped)
    assert json.loads(as_json(stopped))["complete"] is False


def test_a_level_without_any_answer_has_a_row_and_no_line_in_the_plots() -> None:
    plan = Plan(levels=(closed_level(1, num_requests=1),), shape=results().plan.shape, num_rounds=1, seed=0)
    load = loaded(1, Failure("cannot connect", "Connection refused"), num=0)
    found = put_together(
        [Run(0, 0, 0, load)],
        plan=plan,
        servers=[server("http://a")],
        objective=None,
        price_per_hour=None,
        began="",
        command="",
        is_whole=True,
    )
    assert "1 request failed: cannot connect (Connection refused)." in printed(found)
    assert charts(found) == []
    assert "cannot connect" in page(found)


def test_gaps_of_zero_are_explained() -> None:
    assert "80% of the events came in one piece with the event before them" in printed(results(gaps_ms=((0, 5),)))
    assert "in one piece" not in printed(results())


def test_points_lie_inside_the_plot() -> None:
    for chart in charts(results()):
        drawn = svg(chart)
        points = [
            tuple(map(float, p.split(","))) for line in re.findall(r'points="([^"]*)"', drawn) for p in line.split()
        ]
        assert points
        assert all(60 <= x <= 560 and 0 <= y <= 300 for x, y in points)


def test_ticks_are_round_numbers_around_the_values() -> None:
    assert list(ticks(0, 37)) == [0, 10, 20, 30, 40]
    assert list(ticks(0, 1)) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert list(log_ticks(3, 40)) == [2, 5, 10, 20, 50]
    assert list(log_ticks(5, 5)) == [5, 10]
    wide = list(log_ticks(0.02, 9000))
    assert wide[0] == pytest.approx(0.02)
    assert wide[-1] == 10000
    assert len(wide) <= 10
