"""Finds stop strings in text that arrives in pieces, also across pieces.

Knows text only: no tokens, no requests. Emitted text is final: the longest tail that could be the start of a stop string is held back
until the next piece decides.

Worked example, stops ["END"]: push("the E") -> "the ", push("N") -> "", push("Dx") -> "" and stopped; or push("t") -> "ENt".
"""

from collections.abc import Sequence


class StopChecker:
    """One sequence's stop strings. If several match, the one that ends first wins, then the one that starts first."""

    def __init__(self, stops: Sequence[str], *, include_stop: bool = False) -> None:
        assert all(stops), "an empty stop string would match everywhere"
        self._stops = tuple(stops)
        self._include_stop = include_stop
        self._held = ""
        self._max_held = max(map(len, stops), default=1) - 1
        self.stop: str | None = None  # the stop string found

    def push(self, text: str) -> tuple[str, bool]:
        """The text that is final now, and whether a stop string ended the sequence. After a stop, all text is dropped."""
        if self.stop is not None:
            return "", True
        if not self._stops:
            return text, False
        text = self._held + text
        end, begin, stop = min(
            ((at + len(s), at, s) for s in self._stops if (at := text.find(s)) >= 0), default=(0, 0, None)
        )
        if stop is not None:
            self.stop = stop
            self._held = ""
            return text[: end if self._include_stop else begin], True
        num_held = self._num_held(text)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held], False

    def flush(self) -> str:
        """The text held back, when no text follows."""
        text, self._held = self._held, ""
        return text

    def _num_held(self, text: str) -> int:
        for size in range(min(self._max_held, len(text)), 0, -1):
            tail = text[-size:]
            if any(len(s) > size and s.startswith(tail) for s in self._stops):
                return size
        return 0
