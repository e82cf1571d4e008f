"""Stop strings are found however the text is split, and shown text is final."""

from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cluster.text.output.stop_strings import StopChecker


def feed(checker: StopChecker, parts: list[str]) -> tuple[str, bool]:
    shown = ""
    for part in parts:
        emit, stopped = checker.push(part)
        shown += emit
        if stopped:
            return shown, True
    return shown + checker.flush(), False


@pytest.mark.parametrize(
    ("stops", "parts", "shown", "stopped"),
    [
        (["END"], ["the E", "N", "D of it"], "the ", True),
        (["END"], ["the E", "N", "t"], "the ENt", False),
        (["END"], ["the EN"], "the EN", False),
        (["aab"], ["a", "a", "a", "b"], "a", True),
        (["\n\n"], ["x\n", "y\n", "\nz"], "x\ny", True),
        (["abcd", "c"], ["ab", "cd"], "ab", True),
        (["bc", "abc"], ["abc"], "", True),
        (["é"], ["caf", "é"], "caf", True),
        ([], ["any", "thing"], "anything", False),
    ],
)
def test_cases(stops: list[str], parts: list[str], shown: str, stopped: bool) -> None:
    assert feed(StopChecker(stops), parts) == (shown, stopped)


def test_the_docstrings_example() -> None:
    checker = StopChecker(["END"])
    assert checker.push("the E") == ("the ", False)
    assert checker.push("N") == ("", False)
    assert checker.push("Dx") == ("", True)
    assert checker.push("more") == ("", True)


def test_the_stop_string_can_be_kept() -> None:
    checker = StopChecker(["END"], include_stop=True)
    assert feed(checker, ["the E", "NDx"]) == ("the END", True)
    assert checker.stop == "END"


@given(
    text=st.text("ab", max_size=30),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    cuts=st.lists(st.integers(0, 30), max_size=5),
    include=st.booleans(),
)
@example(text="aabab", stops=["abab", "ba"], cuts=[1, 2, 3], include=False)
def test_any_split_equals_the_whole(text: str, stops: list[str], cuts: list[int], include: bool) -> None:
    at = [0, *sorted(cuts), len(text)]
    parts = [text[a:b] for a, b in pairwise(at)]
    ends = [(text.index(s) + len(s), text.index(s)) for s in stops if s in text]
    if ends:
        end, begin = min(ends)
        expected = (text[: end if include else begin], True)
    else:
        expected = (text, False)
    assert feed(StopChecker(stops, include_stop=include), parts) == expected
