"""What `--prompt-tokens` and `--objective` mean."""

import random
import statistics

import pytest

from cluster.bench.lengths import parse_lengths
from cluster.bench.objective import parse_objective


def sampled(text: str, num: int = 4000) -> list[int]:
    return parse_lengths(text).sample(random.Random(1), num)


def test_a_fixed_length() -> None:
    assert sampled("256", 3) == [256, 256, 256]


def test_a_uniform_length_has_both_ends() -> None:
    assert set(sampled("3-6")) == {3, 4, 5, 6}


def test_a_normal_length_has_its_mean_and_deviation_and_is_never_below_one() -> None:
    found = sampled("normal:100:20")
    assert statistics.mean(found) == pytest.approx(100, abs=2)
    assert statistics.stdev(found) == pytest.approx(20, abs=1)
    assert min(sampled("normal:2:50")) == 1


def test_a_lognormal_length_has_its_median_and_a_long_tail() -> None:
    found = sampled("lognormal:200:0.8")
    assert statistics.median(found) == pytest.approx(200, rel=0.05)
    assert statistics.mean(found) == pytest.approx(200 * 2.718 ** (0.8**2 / 2), rel=0.1)


def test_the_same_seed_samples_the_same() -> None:
    assert sampled("1-1000", 20) == sampled("1-1000", 20)


@pytest.mark.parametrize("text", ["", "0", "-1", "6-3", "0-3", "normal:0:1", "normal:1", "lognormal:9:77", "x", "1.5"])
def test_what_is_not_a_length_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a number of tokens; write 256"):
        parse_lengths(text)


def test_an_objective_is_met_where_every_limit_is() -> None:
    objective = parse_objective("ttft=500ms, gap=50ms,e2e=2s")
    assert objective.limits_s == {"ttft": 0.5, "gap": 0.05, "e2e": 2.0}
    times: dict[str, float | None] = {"ttft": 0.5, "gap": 0.05, "max_gap": 9.0, "e2e": 1.0}
    assert objective.is_met(times)
    assert not objective.is_met(times | {"gap": 0.051})
    assert objective.is_met(times | {"gap": None})  # a single token has no gap


@pytest.mark.parametrize("text", ["", "ttft", "ttft=5", "ttft=-5ms", "speed=5ms", "ttft=5ms;gap=1ms"])
def test_what_is_not_an_objective_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a limit"):
        parse_objective(text)
