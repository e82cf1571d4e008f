"""Reads tool calls from the text after the control token [TOOL_CALLS], as the pieces arrive.

Knows Mistral's format, ` [{"name": "f", "arguments": {...}}, ...]`, and the strings and brackets of JSON; no tokens and no schema. A call
is reported as soon as its name is complete; its arguments follow as exact pieces of the text. Text that is cut off or is not JSON never
raises: the calls read so far remain, the last one with incomplete arguments.

Worked example: push(' [{"name": "f", "argum') -> call 0 with id and name; push('ents": {"a"') -> '{"a"'; push(': 1}}]') -> ': 1}'.
"""

import json
import secrets
import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

# How a model writes calls: list, this file's; names: named_calls.py; tags: tagged_calls.py.
CallFormat = Literal["list", "names", "tags"]
TOOL_CALL_ID_CHARS = 9
_ALPHANUMERIC = string.ascii_letters + string.digits


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A piece of the call number `index`. The first has the id and name, the others the next part of the arguments' JSON text."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


def new_tool_call_id() -> str:
    """9 random letters and digits, as Mistral's templates require."""
    return "".join(secrets.choice(_ALPHANUMERIC) for _ in range(TOOL_CALL_ID_CHARS))


class ToolCallParser:
    """The calls of one sequence. `new_id` is replaceable for tests."""

    def __init__(self, *, new_id: Callable[[], str] = new_tool_call_id) -> None:
        self._new_id = new_id
        self._deltas: list[ToolCallDelta] = []
        self._depth = 0  # brackets open
        self._call_depth: int | None = None  # the depth inside a call's object; None before the first bracket
        self._is_text = False  # the text after the token is prose, not calls
        self._in_call = False
        self._in_string = False
        self._escaped = False
        self._key: str | None = None  # of the call's field that is being read
        self._value: list[str] = []  # its text so far; of the arguments, what is not out yet
        self._opens: str | None = None  # the value's first character
        self._name: str | None = None
        self._arguments: list[str] | None = None  # read, but waiting for the name
        self.num_calls = 0  # with a name

    @property
    def in_string(self) -> bool:
        """Whether the text so far ends inside a string of the JSON."""
        return self._in_string

    def push(self, text: str) -> tuple[str, list[ToolCallDelta]]:
        """The part of `text` that is not a call, and the pieces of calls it adds."""
        for at, char in enumerate(text):
            if not self._is_text:
                self._read(char)
            if self._is_text:
                return text[at:], []
        if self._key == "arguments" and self._opens != '"':
            self._continue_arguments()
        deltas, self._deltas = self._deltas, []
        return "", _merge(deltas)

    def _read(self, char: str) -> None:
        if self._in_string:
            self._value.append(char)
            if self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = True
            elif char == '"':
                self._in_string = False
                if self._in_call and self._depth == self._call_depth and self._key == "name":
                    self._end_value()
        elif not self._in_call:
            self._read_between(char)
        elif self._depth == self._call_depth:
            self._read_field(char)
        else:
            self._read_nested(char)

    def _read_between(self, char: str) -> None:
        """Between the calls: the brackets and commas of the list."""
        if self._call_depth is None:
            if char.isspace():
                return
            if char not in "[{":
                self._is_text = True
                return
            self._call_depth = 2 if char == "[" else 1
        if char in "[{":
            self._depth += 1
            if char == "{" and self._depth == self._call_depth:
                self._in_call, self._name, self._arguments = True, None, None
                self._start_field()
        elif char in "]}":
            self._depth = max(self._depth - 1, 0)

    def _read_field(self, char: str) -> None:
        """Inside the object of a call, but not inside one of its nested values."""
        if char == ":" and self._key is None:
            key = _decode("".join(self._value))
            self._start_field()
            self._key = key if isinstance(key, str) else ""
        elif char == ",":
            self._end_value()
            self._start_field()
        elif char in "]}":
            self._end_value()
            self._depth -= 1
            self._end_call()
        elif not char.isspace():
            self._opens = self._opens or char
            self._value.append(char)
            self._in_string = char == '"'
            if char in "[{":
                self._depth += 1

    def _read_nested(self, char: str) -> None:
        self._value.append(char)
        if char == '"':
            self._in_string = True
        elif char in "[{":
            self._depth += 1
        elif char in "]}":
            self._depth -= 1

    def _start_field(self) -> None:
        self._key, self._value, self._opens = None, [], None

    def _end_value(self) -> None:
        if self._key == "name" and self._name is None:
            name = _decode("".join(self._value))
            if isinstance(name, str) and name:
                self._name = name
                self._deltas.append(ToolCallDelta(self.num_calls, id=self._new_id(), name=name))
                self.num_calls += 1
                if self._arguments is not None:
                    self._emit(self._arguments)
        elif self._key == "arguments":
            if self._opens == '"':  # some models write the arguments' JSON as a string
                text = _decode("".join(self._value))
                self._value = [text] if isinstance(text, str) else []
            self._continue_arguments()

    def _continue_arguments(self) -> None:
        if self._arguments is None:
            self._arguments = []
        if self._name is None:
            self._arguments += self._value
        else:
            self._emit(self._value)
        self._value = []

    def _emit(self, parts: list[str]) -> None:
        if parts:
            self._deltas.append(ToolCallDelta(self.num_calls - 1, arguments="".join(parts)))

    def _end_call(self) -> None:
        if self._name is not None and self._arguments is None:
            self._emit(["{}"])
        self._in_call = False
        self._start_field()


def _decode(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _merge(deltas: list[ToolCallDelta]) -> list[ToolCallDelta]:
    """Joins neighbouring pieces of the same call."""
    merged: list[ToolCallDelta] = []
    for delta in deltas:
        if merged and merged[-1].index == delta.index:
            last = merged[-1]
            merged[-1] = ToolCallDelta(last.index, last.id, last.name, last.arguments + delta.arguments)
        else:
            merged.append(delta)
    return merged
