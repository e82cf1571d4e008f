"""From the text of an option to its value. Every function raises ValueError with the reason, which the parser shows after the option."""

import json
import re
from typing import Any, NoReturn

from cluster.batch.records import parse_window
from workers.errors import RequestError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_positive(text: str) -> int:
    """A whole number of at least 1."""
    try:
        value = int(text)
    except ValueError as e:
        raise ValueError(f"{text!r} is not a whole number") from e
    if value < 1:
        raise ValueError(f"{value} is less than 1")
    return value


def parse_replicas(text: str) -> tuple[int, int]:
    """ "2" is exactly two, "1:4" one to four, "0:4" none while there are no requests."""
    match = re.fullmatch(r"(\d{1,4})(?::(\d{1,4}))?", text.strip())
    low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if high < 1 or low > high:
        raise ValueError(
            f"{text!r} is not a number of replicas; write N, or MIN:MAX with MAX at least 1, as in 2 or 0:4"
        )
    return low, high


def parse_bytes(text: str) -> int:
    """ "4GiB", "500MB", "1.5g" or plain bytes."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?i?)b?", text.strip().lower())
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"{text!r} is not an amount of memory; write it like 4GiB or 500MB")
    amount = int(float(match[1]) * _UNITS[match[2]])
    if amount < 1:
        raise ValueError(f"{text!r} is less than one byte of memory")
    return amount


def show_bytes(num_bytes: int) -> str:
    """The inverse of parse_bytes, in the largest binary unit that divides it: 1073741824 is "1GiB"."""
    for unit in ("ti", "gi", "mi", "ki"):
        if num_bytes and num_bytes % _UNITS[unit] == 0:
            return f"{num_bytes // _UNITS[unit]}{unit.capitalize()}B"
    return str(num_bytes)


def parse_deadline(text: str) -> str:
    """A number and a unit, such as "2h"; the text itself."""
    try:
        parse_window(text)
    except RequestError as e:
        raise ValueError(f"{text!r}: write a number and a unit, s, m, h or d, such as 2h") from e
    return text


def parse_whole(text: str) -> int:
    """A whole number of at least 0."""
    if not re.fullmatch(r"\d{1,18}", text.strip()):
        raise ValueError(f"{text!r} is not a whole number of at least 0")
    return int(text)


def parse_numbers(text: str) -> tuple[int, ...]:
    """ "1,8,32": whole numbers of at least 1, each once, in this order."""
    return tuple(dict.fromkeys(parse_positive(part) for part in text.split(",")))


def parse_rate(text: str) -> float:
    """A number above 0."""
    try:
        value = float(text)
    except ValueError as e:
        raise ValueError(f"{text!r} is not a number") from e
    if not 0 < value < float("inf"):
        raise ValueError(f"{text!r} is not a number above 0")
    return value


def parse_seconds(text: str) -> float:
    """A number of seconds above 0, with or without an s."""
    return parse_rate(text.strip().removesuffix("s"))


def parse_field(text: str) -> tuple[str, Any]:
    """FIELD=VALUE of a request's body: the value in JSON, and what is not JSON is text. "top_k=40" is 40, "user=me" is "me"."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ValueError(f"{text!r} is not FIELD=VALUE; write it like top_k=40")
    try:
        return name, json.loads(value, parse_constant=_not_json)
    except ValueError:
        return name, value


def _not_json(text: str) -> NoReturn:
    """NaN and Infinity, which Python reads and JSON has not."""
    raise ValueError(text)
