"""Intervals and paired comparisons, against published and hand-computed values."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.eval.scores import Difference, Share, compare


def test_the_worked_examples():
    low, high = Share(8, 10).interval
    assert (low, high) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert Difference(better=5, worse=0, total=40).p_value == pytest.approx(0.0625)


@given(st.integers(0, 200), st.integers(0, 200))
def test_an_interval_holds_its_share_and_gets_narrower(passed, more):
    total = passed + more
    low, high = Share(passed, total).interval
    assert 0.0 <= low <= high <= 1.0
    if total:
        assert low <= Share(passed, total).value <= high
        wider = Share(passed * 4, total * 4).interval
        assert wider[1] - wider[0] < high - low


@given(st.integers(0, 40), st.integers(0, 40))
def test_a_difference_is_symmetric(better, worse):
    one, other = Difference(better, worse, 100), Difference(worse, better, 100)
    assert one.value == -other.value
    assert one.interval == pytest.approx((-other.interval[1], -other.interval[0]))
    assert one.p_value == other.p_value <= 1.0
    if better == worse:
        assert one.p_value == 1.0


def test_only_items_that_both_answered_are_compared():
    found = compare({"a": True, "b": True, "c": False, "d": True}, {"a": False, "b": True, "c": True})
    assert (found.better, found.worse, found.total) == (1, 1, 3)
