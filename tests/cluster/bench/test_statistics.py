"""Numbers that are known beforehand: percentiles, rates, goodput, price, medians over rounds, ratios."""

import pytest

from cluster.bench.exchange import Failure, Outcome
from cluster.bench.load import Loaded
from cluster.bench.objective import parse_objective
from cluster.bench.own_cost import OwnCost, warning
from cluster.bench.statistics import Spread, Summary, over_rounds, ratios, summarize


def answer(asked_s: float, *times_s: float, num_output: int | None = None) -> Outcome:
    """A whole answer with these events."""
    return Outcome(
        asked_s,
        asked_s + 0.002,
        wanted_output=4,
        times_s=list(times_s),
        ended_s=times_s[-1],
        num_prompt=10,
        num_output=len(times_s) if num_output is None else num_output,
        has_usage=True,
    )


def failed(kind: str, message: str = "m", retry_after_s: float | None = None) -> Outcome:
    return Outcome(0.0, 0.0, 4, failure=Failure(kind, message, retry_after_s))


def run(
    *outcomes: Outcome, duration_s: float = 10.0, objective: str | None = None, price: float | None = None
) -> Summary:
    loaded = Loaded(list(outcomes), began_s=100.0, ended_s=100.0 + duration_s)
    parsed = None if objective is None else parse_objective(objective)
    return summarize(loaded, objective=parsed, price_per_hour=price)


def test_times_and_rates_of_a_run() -> None:
    found = run(answer(0, 0.1, 0.2, 0.4, 0.5), answer(1, 1.3, 1.4, 1.5, 1.6)).metrics
    assert found["ttft_p50"] == pytest.approx(200)  # of 100 and 300
    assert found["ttft_p90"] == pytest.approx(280)
    assert found["gap_p50"] == pytest.approx(100)  # 100, 200, 100, 100, 100, 100
    assert found["gap_p99"] == pytest.approx(195)
    assert found["mean_gap_p50"] == pytest.approx((400 / 3 + 100) / 2)
    assert found["e2e_p50"] == pytest.approx(550)
    assert found["tokens_per_s"] == pytest.approx(0.8)
    assert found["total_tokens_per_s"] == pytest.approx(2.8)
    assert found["requests_per_s"] == pytest.approx(0.2)
    assert "goodput" not in found
    assert "usd_per_million" not in found


def test_tokens_are_counted_by_usage_and_not_by_events() -> None:
    """Two tokens in each event: the gap is that between events, the time per token is half of it."""
    summary = run(answer(0, 0.1, 0.2, 0.3, num_output=5))
    assert summary.metrics["gap_p50"] == pytest.approx(100)
    assert summary.metrics["mean_gap_p50"] == pytest.approx(50)
    assert (summary.num_output_tokens, summary.num_events) == (5, 3)


def test_events_of_one_piece_are_counted() -> None:
    assert run(answer(0, 0.1, 0.2, 0.2, 0.2), answer(0, 0.3, 0.3)).num_joined == 3


def test_goodput_counts_what_meets_the_objective_of_all_that_was_asked() -> None:
    outcomes = [
        answer(0, 0.1, 0.2),
        answer(0, 0.6, 0.7),  # too late
        answer(0, 0.1, 0.4),  # too slow
        answer(0, 0.5),  # a single token has no gap
        failed("HTTP 503"),
    ]
    found = run(*outcomes, objective="ttft=500ms,gap=100ms").metrics
    assert found["goodput"] == pytest.approx(0.2)
    assert found["met"] == pytest.approx(40)


def test_the_longest_gap_may_be_limited_as_well() -> None:
    outcome = answer(0, 0.1, 0.15, 0.2, 0.25, 0.5)
    assert run(outcome, objective="gap=100ms").metrics["met"] == 100
    assert run(outcome, objective="max_gap=100ms").metrics["met"] == 0


def test_the_price_of_a_million_tokens() -> None:
    """2 USD an hour, 40 tokens a second: 144,000 tokens an hour, so 13.89 USD."""
    outcome = answer(0, 0.1, num_output=400)
    assert run(outcome, price=2.0).metrics["usd_per_million"] == pytest.approx(13.888888)


def test_failures_are_counted_by_kind_and_have_no_times() -> None:
    summary = run(
        failed("HTTP 429", "busy", 2.0), failed("HTTP 429", "later", 7.0), failed("cannot connect"), answer(0, 0.1, 0.2)
    )
    assert {kind: p.num for kind, p in summary.problems.items()} == {"HTTP 429": 2, "cannot connect": 1}
    assert summary.problems["HTTP 429"].message == "busy"
    assert summary.problems["HTTP 429"].max_retry_after_s == 7.0
    assert (summary.num_ok, summary.num_failed) == (1, 3)
    assert summary.metrics["requests_per_s"] == pytest.approx(0.1)


def test_a_run_without_any_answer_has_no_metrics_but_the_objective_s() -> None:
    assert run(failed("timeout")).metrics == {}
    assert run(failed("timeout"), objective="ttft=1s").metrics == {"goodput": 0.0, "met": 0.0}


def rounds(*ttft_ms: float) -> list[Summary]:
    return [run(answer(0, t / 1e3)) for t in ttft_ms]


def test_rounds_have_a_median_and_a_range() -> None:
    assert over_rounds(rounds(10, 30, 20))["ttft_p50"] == Spread(
        pytest.approx(20), pytest.approx(10), pytest.approx(30)
    )


def test_ratios_are_those_of_the_same_round() -> None:
    """The machine became twice as slow in the second round, for both servers; the ratio is not concerned."""
    found = ratios(rounds(10, 20, 10), rounds(12, 24, 13))["ttft_p50"]
    assert (found.median, found.low, found.high) == pytest.approx((1.2, 1.2, 1.3))


def test_a_round_in_which_a_server_has_no_answer_has_no_ratio() -> None:
    found = ratios([run(failed("timeout")), *rounds(10)], rounds(5, 20))
    assert found["ttft_p50"] == Spread(pytest.approx(2), pytest.approx(2), pytest.approx(2))


@pytest.mark.parametrize(
    ("cost", "words"),
    [
        (OwnCost(cpu_s=0.9, wall_s=1.0), "it used 90% of a core"),
        (OwnCost(cpu_s=0.1, wall_s=1.0, late_s=[0.02] * 100), "more than 20.0 ms late"),
        (OwnCost(cpu_s=0.1, wall_s=1.0, late_s=[0.001] * 100), None),
        (OwnCost(), None),
    ],
)
def test_a_client_that_was_the_bottleneck_says_so(cost: OwnCost, words: str | None) -> None:
    found = warning(cost, gap_s=0.01)
    assert found is None if words is None else words in str(found)
