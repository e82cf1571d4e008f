"""The part of an output in which the model thinks: what Magistral writes between its control tokens [THINK] and [/THINK].

Knows these two tokens and how ids become text; no stop strings and no tool calls, which are not part of thoughts.
"""

from cluster.text.output.detokenizer import Detokenizer
from cluster.text.tokenizer import Tokenizer

BEGIN, END = "[THINK]", "[/THINK]"


def think_token_ids(tokenizer: Tokenizer) -> tuple[int, int] | None:
    """The two tokens; None for vocabularies that have not both, whose models do not think."""
    begin, end = tokenizer.control_token_id(BEGIN), tokenizer.control_token_id(END)
    return None if begin is None or end is None else (begin, end)


class ThoughtReader:
    """Of one sequence. Thoughts that have no end when the output ends are thoughts."""

    def __init__(self, tokenizer: Tokenizer, *, token_ids: tuple[int, int]) -> None:
        self._pieces = tokenizer.pieces
        self._begin, self._end = token_ids
        self._detokenizer: Detokenizer | None = None  # while the model thinks

    def push(self, token_id: int) -> str | None:
        """The text that a token adds to the thoughts; None for a token that is not part of them."""
        if token_id == self._begin:
            rest = self.flush()
            self._detokenizer = Detokenizer(self._pieces)
            return rest
        if token_id == self._end:
            return self.flush()
        return None if self._detokenizer is None else self._detokenizer.push_token(token_id)[1]

    def flush(self) -> str:
        """Ends the thoughts, if there are any, and returns the text that was held back."""
        detokenizer, self._detokenizer = self._detokenizer, None
        return "" if detokenizer is None else detokenizer.flush()
