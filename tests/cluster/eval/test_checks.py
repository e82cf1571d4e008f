"""Checks of answers: what passes, what does not, and what is wrong with a check."""

import pytest

from cluster.eval.checks import last_number, parse_check


class NoOracle:
    def logprob(self, option: str) -> float:
        raise AssertionError("a check of text asks no model")

    def judge(self, question: str, answer: str) -> bool:
        raise AssertionError("a check of text asks no model")


class Oracle:
    def __init__(self, logprobs: dict[str, float], *, says_yes: bool = True) -> None:
        self.logprobs, self.says_yes, self.asked = logprobs, says_yes, []

    def logprob(self, option: str) -> float:
        return self.logprobs[option]

    def judge(self, question: str, answer: str) -> bool:
        self.asked.append((question, answer))
        return self.says_yes


@pytest.mark.parametrize(
    ("check", "answer", "passes"),
    [
        ({"exact": "Paris"}, "  paris.\n", True),
        ({"exact": "Paris"}, "It is Paris", False),
        ({"exact": ["a", "b"]}, "`B`", True),
        ({"contains": ["Paris", "Seine"]}, "PARIS lies on the seine", True),
        ({"contains": ["Paris", "Seine"]}, "Paris", False),
        ({"excludes": "sorry"}, "I am Sorry", False),
        ({"excludes": "sorry"}, "fine", True),
        ({"regex": r"^\d+$"}, " 12 ", True),
        ({"regex": r"^\d+$"}, "a 12", False),
        ({"numeric": 1234.5}, "So 1 + 1 gives 1,234.5 km.", True),
        ({"numeric": 42}, "no number", False),
        ({"numeric": {"value": 3.14, "tolerance": 0.01}}, "3.142", True),
        ({"numeric": {"value": 3.14, "tolerance": 0.001}}, "3.142", False),
        ({"words": {"min": 2, "max": 3}}, "one two three", True),
        ({"words": {"max": 2}}, "one two three", False),
        ({"json_schema": {"type": "object", "required": ["a"]}}, 'Here:\n```json\n{"a": 1}\n```', True),
        ({"json_schema": {"type": "object", "required": ["a"]}}, '{"b": 1}', False),
        ({"json_schema": {"type": "object"}}, "no JSON", False),
        ({"json_schema": {"type": "array"}}, "[" * 100_000, False),
        ({"all": [{"contains": "a"}, {"words": {"max": 1}}]}, "banana", True),
        ({"all": [{"contains": "a"}, {"words": {"max": 1}}]}, "a b", False),
    ],
)
def test_answers(check, answer, passes):
    parsed = parse_check(check)
    assert parsed.passes(answer, NoOracle()) is passes
    assert parsed.needs_answer
    assert not parsed.needs_judge


def test_a_choice_is_the_most_probable_option_and_needs_no_answer():
    check = parse_check({"choice": {"options": ["yes", "no"], "answer": "no"}})
    assert check.passes("", Oracle({"yes": -2.0, "no": -1.0}))
    assert not check.passes("", Oracle({"yes": -1.0, "no": -2.0}))
    assert not check.needs_answer


def test_a_judge_decides():
    check = parse_check({"all": [{"contains": "x"}, {"judge": "Is it kind?"}]})
    assert check.needs_judge
    oracle = Oracle({}, says_yes=False)
    assert not check.passes("x", oracle)
    assert oracle.asked == [("Is it kind?", "x")]


@pytest.mark.parametrize(
    ("check", "reason"),
    [
        (None, "not an object with one of exact"),
        ({"exact": "a", "regex": "b"}, "not an object with one of"),
        ({"like": "a"}, "there is no check 'like'"),
        ({"regex": "("}, "regular expression"),
        ({"numeric": "many"}, "not a number"),
        ({"numeric": True}, "not a number"),
        ({"words": {"most": 3}}, "min, max or both"),
        ({"contains": []}, "text or a list"),
        ({"json_schema": {"type": "thing"}}, "not a valid schema"),
        ({"choice": {"options": ["a"], "answer": "a"}}, "two or more"),
        ({"choice": {"options": ["a", "b"], "answer": "c"}}, "one of them"),
        ({"judge": ""}, "yes or no"),
        ({"all": []}, "list of checks"),
    ],
)
def test_what_is_wrong_with_a_check_is_said(check, reason):
    with pytest.raises(ValueError, match=reason):
        parse_check(check)


@pytest.mark.parametrize(("text", "number"), [("-3", -3), ("1e3", 1000), ("v1.2 then 7", 7), ("", None)])
def test_the_last_number(text, number):
    assert last_number(text) == number
