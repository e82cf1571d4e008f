"""Which requests a workload plans, and what their prompts have in common."""

import itertools
import statistics

import pytest

from cluster.bench.lengths import parse_lengths
from cluster.bench.prompts import WORDS, Prompts
from cluster.bench.trace import TraceRow
from cluster.bench.workload import Part, Planned, Shape, closed_level, plan_requests, poisson_level, trace_level

SHAPE = Shape(prompt=parse_lengths("10-20"), output=parse_lengths("5"))
IDS = Prompts(tuple(range(100, 1100)))


def lengths(planned: list[Planned]) -> list[tuple[int, int]]:
    return [(sum(part.num_tokens for part in p.parts), p.num_output) for p in planned]


def test_the_same_seed_plans_the_same_and_another_seed_does_not() -> None:
    level = closed_level(4, num_requests=50)
    first, again, other = (plan_requests(level, SHAPE, seed=s, salt=0) for s in (1, 1, 2))
    assert first == again
    assert lengths(first) != lengths(other)
    assert all(10 <= num <= 20 and out == 5 for num, out in lengths(first))
    assert all(p.at_s is None for p in first)


def test_two_servers_get_the_same_lengths_and_other_tokens() -> None:
    level = poisson_level(5, num_requests=20)
    first, second = (plan_requests(level, SHAPE, seed=1, salt=salt) for salt in (0, 2))
    assert lengths(first) == lengths(second)
    assert [p.at_s for p in first] == [p.at_s for p in second]
    assert IDS.make(first[0])[:5] != IDS.make(second[0])[:5]


def test_arrivals_are_a_poisson_process() -> None:
    planned = plan_requests(poisson_level(4, num_requests=4000), SHAPE, seed=3, salt=0)
    at = [p.at_s for p in planned if p.at_s is not None]
    gaps = [b - a for a, b in itertools.pairwise(at)]
    assert at[0] == 0
    assert statistics.mean(gaps) == pytest.approx(1 / 4, rel=0.05)
    assert statistics.stdev(gaps) == pytest.approx(1 / 4, rel=0.05)  # an exponential distribution's equals its mean


def test_a_shared_prefix_is_the_same_tokens_before_every_prompt() -> None:
    shape = Shape(prompt=parse_lengths("8"), output=parse_lengths("1"), shared_prefix=30)
    prompts = [IDS.make(p) for p in plan_requests(closed_level(1, num_requests=5), shape, seed=1, salt=0)]
    assert {tuple(p[:30]) for p in prompts} == {tuple(prompts[0][:30])}
    assert len({tuple(p[30:]) for p in prompts}) == 5
    assert {len(p) for p in prompts} == {38}


def test_several_prefixes_are_all_used() -> None:
    shape = Shape(prompt=parse_lengths("1"), output=parse_lengths("1"), shared_prefix=30, num_prefixes=3)
    planned = plan_requests(closed_level(1, num_requests=60), shape, seed=1, salt=0)
    assert len({p.parts[0] for p in planned}) == 3


def test_blocks_of_a_trace_are_equal_where_their_ids_are() -> None:
    rows = [
        TraceRow(0, 700, 6, (4, 9)),
        TraceRow(2, 1100, 3, (4, 9, 11)),
        TraceRow(3, 520, 1, (7, 9)),
        TraceRow(4, 9, 1),
    ]
    planned = plan_requests(trace_level(rows, name="t", speed=2), SHAPE, seed=1, salt=0)
    assert [p.at_s for p in planned] == [0, 1, 1.5, 2]
    assert [part.num_tokens for part in planned[0].parts] == [512, 188]  # the example of the docstring
    first, second, third, _ = (IDS.make(p) for p in planned)
    assert second[:700] == first
    assert third[:512] != first[:512]
    assert third[512:] == first[512:520]
    assert lengths(planned) == [(700, 6), (1100, 3), (520, 1), (9, 1)]


def test_ids_come_from_the_given_ones() -> None:
    planned = Planned((Part((1,), 500),), 1)
    assert set(Prompts((7, 8, 9)).make(planned)) == {7, 8, 9}


def test_text_has_as_many_words_as_make_the_tokens() -> None:
    planned = Planned((Part((1,), 100), Part((2,), 50)), 1)
    text = Prompts(None, tokens_per_word=2.0, num_extra=10).make(planned)
    assert isinstance(text, str)
    assert len(text.split()) == 50 + 20  # the template's 10 tokens replace some of the last part
    assert set(text.split()) <= set(WORDS)
