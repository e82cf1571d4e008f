"""Reads tool calls between tags, as the format of Hermes has them, which most ChatML fine-tunes use:

    Let me see. <tool_call>
    {"name": "f", "arguments": {...}}
    </tool_call>

Knows the tags and, through calls.py, the JSON between them; no tokens and no schema. A tag may be several tokens, so text that could begin
one is held back, as is white space, which belongs to the tag after it. Anything else between tags is text, with its tags.
"""

from collections.abc import Callable
from dataclasses import replace

from cluster.text.tools.calls import ToolCallDelta, ToolCallParser, new_tool_call_id

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class TaggedCallReader:
    """The calls of one sequence. `new_id` is replaceable for tests."""

    def __init__(self, *, new_id: Callable[[], str] = new_tool_call_id) -> None:
        self._new_id = new_id
        self._held = ""  # not read yet: it may be the beginning of a tag
        self._parser: ToolCallParser | None = None  # of the call that is open
        self._num_ended = 0  # calls before it
        self._shows_tags = False  # the open tag is part of the text

    @property
    def num_calls(self) -> int:
        """With a name."""
        return self._num_ended + (0 if self._parser is None else self._parser.num_calls)

    @property
    def is_open(self) -> bool:
        """Whether the last tag was an opening one."""
        return self._parser is not None

    def push(self, text: str) -> tuple[str, list[ToolCallDelta]]:
        """The part of the text so far that is not a call and cannot become one, and the pieces of calls that are new."""
        shown: list[str] = []
        deltas: list[ToolCallDelta] = []
        self._held += text
        while self._read_open(shown, deltas) if self.is_open else self._read_text(shown):
            pass
        return "".join(shown), deltas

    def flush(self) -> str:
        """The rest of the text, when none follows."""
        held, self._held = self._held, ""
        return "" if self.is_open else held

    def _read_text(self, shown: list[str]) -> bool:
        """Whether a tag was opened."""
        before, tag, after = self._held.partition(OPEN)
        if tag:
            shown.append(before.rstrip())
            self._held, self._parser, self._shows_tags = after, ToolCallParser(new_id=self._new_id), False
            return True
        end = len(before) - _overlap(before, OPEN)
        final = before[:end].rstrip()
        shown.append(final)
        self._held = before[len(final) :]
        return False

    def _read_open(self, shown: list[str], deltas: list[ToolCallDelta]) -> bool:
        """Whether the tag was closed. A tag in a string of the JSON closes nothing."""
        assert self._parser is not None
        at = 0
        while (found := self._held.find("<", at)) >= 0:
            self._feed(self._held[at:found], shown, deltas)
            at, rest = found, self._held[found:]
            if not self._parser.in_string:
                if rest.startswith(CLOSE):
                    self._close(shown, rest.removeprefix(CLOSE))
                    return True
                if CLOSE.startswith(rest):
                    self._held = rest
                    return False
            self._feed("<", shown, deltas)
            at += 1
        self._feed(self._held[at:], shown, deltas)
        self._held = ""
        return False

    def _feed(self, text: str, shown: list[str], deltas: list[ToolCallDelta]) -> None:
        assert self._parser is not None
        prose, found = self._parser.push(text)
        if prose and not self._shows_tags:
            self._shows_tags = True
            shown.append(OPEN)
        shown.append(prose)
        deltas += [replace(delta, index=delta.index + self._num_ended) for delta in found]

    def _close(self, shown: list[str], rest: str) -> None:
        assert self._parser is not None
        if self._shows_tags:
            shown.append(CLOSE)
        self._num_ended += self._parser.num_calls
        self._parser, self._held = None, rest


def _overlap(text: str, tag: str) -> int:
    """How many characters at the end of the text are the beginning of the tag."""
    return next((n for n in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:n])), 0)
