"""Reads the tool calls of one sequence in whichever of Mistral's two formats the model writes them.

Knows how to tell them apart: after [TOOL_CALLS], a bracket begins a JSON list (calls.py), anything else a name (named_calls.py), where the
vocabulary has the control token that ends one. Knows no tokens.
"""

from collections.abc import Callable

from cluster.text.tools.calls import ToolCallDelta, ToolCallParser, new_tool_call_id
from cluster.text.tools.named_calls import NamedCallParser

_LIST = "[{"


class CallReader:
    """names: whether the vocabulary has [ARGS], so that calls by name exist. `new_id` is replaceable for tests."""

    def __init__(self, *, names: bool, new_id: Callable[[], str] = new_tool_call_id) -> None:
        self._new_id = new_id
        self._parser: ToolCallParser | NamedCallParser | None = None if names else ToolCallParser(new_id=new_id)

    @property
    def num_calls(self) -> int:
        """With a name."""
        return 0 if self._parser is None else self._parser.num_calls

    def mark(self, token: str) -> list[ToolCallDelta]:
        """A control token of the format, by its name."""
        return self._parser.mark(token) if isinstance(self._parser, NamedCallParser) else []

    def push(self, text: str) -> tuple[str, list[ToolCallDelta]]:
        """The part of `text` that is not a call, and the pieces of calls it adds."""
        if self._parser is None:
            text = text.lstrip()
            if not text:
                return "", []
            kind = ToolCallParser if text[0] in _LIST else NamedCallParser
            self._parser = kind(new_id=self._new_id)
        return self._parser.push(text)
