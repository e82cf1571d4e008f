"""Checks: whether an answer is right. Each is a pure function of the text, but for `choice` and `judge`, which ask a model.

exact: Paris                      the answer, without white space around it and the full stop at its end; case does not count
contains: [Paris, Seine]          every one of them occurs; case does not count
excludes: [sorry]                 none of them occurs
regex: "^[A-Z]{3}-\\\\d+$"          found somewhere in the answer
numeric: 42                       the last number in the answer; {value: 3.14, tolerance: 0.01}
words: {min: 5, max: 20}          how many there are
json_schema: {type: object}       the answer, or the block of code in it, is JSON that fits
choice: {options: [yes, no], answer: yes}     the option that the model finds most probable after the question
judge: "Is the tone friendly?"    a judge model says yes
all: [...]                        several checks
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import jsonschema

_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?")
_CODE_BLOCK = re.compile(r"```[a-zA-Z]*\s*\n(.*?)```", re.DOTALL)


class Oracle(Protocol):
    """What a check may ask."""

    def logprob(self, option: str) -> float:
        """Of the option's text after the question, in nats, summed over its tokens."""
        ...

    def judge(self, question: str, answer: str) -> bool:
        """What the judge model says."""
        ...


@dataclass(frozen=True)
class Check:
    """`passes` may ask the oracle. needs_answer: whether a text has to be generated for it. source: as the suite has it."""

    passes: Callable[[str, Oracle], bool]
    needs_answer: bool = True
    needs_judge: bool = False
    source: Any = None


def parse_check(value: Any) -> Check:
    """Raises ValueError with the reason."""
    if not isinstance(value, dict) or len(value) != 1:
        raise ValueError(f"check is {value!r}, not an object with one of {', '.join(_PARSERS)}")
    ((kind, argument),) = value.items()
    if kind not in _PARSERS:
        raise ValueError(f"there is no check {kind!r}; use one of {', '.join(_PARSERS)}")
    return replace(_PARSERS[kind](argument), source=value)


def last_number(text: str) -> float | None:
    """ "It is 1,234.5 km." -> 1234.5; None without a number."""
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def json_in(text: str) -> Any:
    """The JSON value that a text is, or that its first block of code is. Raises ValueError."""
    block = _CODE_BLOCK.search(text)
    return json.loads(block[1] if block else text)


def _of_text(passes: Callable[[str], bool]) -> Check:
    return Check(lambda answer, _: passes(answer))


def _exact(value: Any) -> Check:
    expected = {_plain(str(one)) for one in (value if isinstance(value, list) else [value])}
    return _of_text(lambda answer: _plain(answer) in expected)


def _plain(text: str) -> str:
    return " ".join(text.split()).strip("\"'`*").removesuffix(".").casefold()


def _strings(value: Any, name: str) -> list[str]:
    values = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(one, str | int | float) for one in values):
        raise ValueError(f"{name} needs a text or a list of texts")
    return [str(one).casefold() for one in values]


def _contains(value: Any) -> Check:
    expected = _strings(value, "contains")
    return _of_text(lambda answer: all(one in answer.casefold() for one in expected))


def _excludes(value: Any) -> Check:
    unwanted = _strings(value, "excludes")
    return _of_text(lambda answer: not any(one in answer.casefold() for one in unwanted))


def _regex(value: Any) -> Check:
    try:
        pattern = re.compile(str(value), re.MULTILINE)
    except re.error as e:
        raise ValueError(f"the regular expression {value!r} is invalid: {e}") from e
    return _of_text(lambda answer: pattern.search(answer.strip()) is not None)


def _numeric(value: Any) -> Check:
    fields = value if isinstance(value, dict) else {"value": value}
    expected, tolerance = fields.get("value"), fields.get("tolerance", 1e-9)
    if isinstance(expected, bool) or not isinstance(expected, int | float) or not isinstance(tolerance, int | float):
        raise ValueError(f"numeric is {value!r}, not a number or {{value, tolerance}}")

    def passes(answer: str) -> bool:
        number = last_number(answer)
        return number is not None and abs(number - expected) <= tolerance

    return _of_text(passes)


def _words(value: Any) -> Check:
    if not isinstance(value, dict) or not value or set(value) - {"min", "max"}:
        raise ValueError(f"words is {value!r}, not an object with min, max or both")
    least, most = value.get("min", 0), value.get("max", float("inf"))
    return _of_text(lambda answer: least <= len(answer.split()) <= most)


def _json_schema(value: Any) -> Check:
    try:
        jsonschema.Draft202012Validator.check_schema(value)
    except jsonschema.SchemaError as e:
        raise ValueError(f"json_schema is not a valid schema: {e.message}") from e
    validator = jsonschema.Draft202012Validator(value)

    def passes(answer: str) -> bool:
        try:
            return validator.is_valid(json_in(answer))
        except (ValueError, RecursionError):
            return False

    return _of_text(passes)


def _choice(value: Any) -> Check:
    options = value.get("options") if isinstance(value, dict) else None
    if not isinstance(options, list) or len(options) < 2 or value.get("answer") not in options:
        raise ValueError("choice needs a list `options` of two or more and an `answer` that is one of them")
    texts = [str(option) for option in options]
    right = options.index(value["answer"])

    def passes(_: str, oracle: Oracle) -> bool:
        scores = [oracle.logprob(text) for text in texts]
        return max(range(len(scores)), key=scores.__getitem__) == right

    return Check(passes, needs_answer=False)


def _judge(value: Any) -> Check:
    if not isinstance(value, str) or not value:
        raise ValueError("judge needs the question that the judge answers with yes or no")
    return Check(lambda answer, oracle: oracle.judge(value, answer), needs_judge=True)


def _all(value: Any) -> Check:
    if not isinstance(value, list) or not value:
        raise ValueError("all needs a list of checks")
    checks: Sequence[Check] = [parse_check(one) for one in value]
    return Check(
        lambda answer, oracle: all(check.passes(answer, oracle) for check in checks),
        needs_answer=any(check.needs_answer for check in checks),
        needs_judge=any(check.needs_judge for check in checks),
    )


_PARSERS: dict[str, Callable[[Any], Check]] = {
    "exact": _exact,
    "contains": _contains,
    "excludes": _excludes,
    "regex": _regex,
    "numeric": _numeric,
    "words": _words,
    "json_schema": _json_schema,
    "choice": _choice,
    "judge": _judge,
    "all": _all,
}
