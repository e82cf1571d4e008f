"""Reads tool calls as models since version 11 of Mistral's format write them: a name, the control token [ARGS], and the arguments' JSON.

    [TOOL_CALLS] add [ARGS] {"a": 1} [TOOL_CALLS] add [ARGS] {"a": 2}        since v13
    [TOOL_CALLS] add [CALL_ID] abcDEF123 [ARGS] {"a": 1}                     v11; the id is left out, since clients get ours

Knows these control tokens by name and the text between them; no tokens and no schema. As in calls.py, a call is reported once its name is
complete, its arguments follow as exact pieces, and nothing raises. A name that is followed by `{` needs no [ARGS]: some models forget it.
"""

import string
from collections.abc import Callable

from cluster.text.tools.calls import ToolCallDelta

CALLS, CALL_ID, ARGS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
_NAME_CHARS = frozenset(string.ascii_letters + string.digits + "_-")


class NamedCallParser:
    """The calls of one sequence, from after its first [TOOL_CALLS]."""

    def __init__(self, *, new_id: Callable[[], str]) -> None:
        self._new_id = new_id
        self._part = CALLS  # the control token after which the text stands
        self._name = ""
        self._is_text = False
        self.num_calls = 0

    def mark(self, token: str) -> list[ToolCallDelta]:
        """A control token."""
        if token == CALLS:
            self._part, self._name = CALLS, ""
        elif token == CALL_ID and self._part == CALLS:
            self._part = CALL_ID
        elif token == ARGS and self._part != ARGS:
            return self._start()
        return []

    def push(self, text: str) -> tuple[str, list[ToolCallDelta]]:
        """The part of `text` that is not a call, and the pieces of calls it adds."""
        if self._is_text or not text:
            return text, []
        if self._part == CALL_ID:
            return "", []
        if self._part == ARGS:
            return "", [ToolCallDelta(self.num_calls - 1, arguments=text)]
        name, brace, rest = text.partition("{")
        self._name += name
        if not _NAME_CHARS.issuperset(self._name.strip()):
            self._is_text = True
            return self._name + brace + rest, []
        if not brace:
            return "", []
        calls = self._start()
        return "", calls and [*calls, ToolCallDelta(self.num_calls - 1, arguments=brace + rest)]

    def _start(self) -> list[ToolCallDelta]:
        self._part, name = ARGS, self._name.strip()
        self._is_text = not name
        if not name:
            return []
        self.num_calls += 1
        return [ToolCallDelta(self.num_calls - 1, id=self._new_id(), name=name)]
