"""One sequence's way from token deltas to text that may be shown: detokenizer, stop strings and log-probability positions.

Knows what a gateway must remember about a sequence. All of it follows from the arguments and the output ids so far, so that
`replay` rebuilds it on another gateway. Knows no HTTP and no replica.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.text.detokenizer import Detokenizer
from cluster.text.stop_strings import StopChecker
from cluster.text.tokenizer import Tokenizer
from workers.protocol import FinishReason, TokenDelta, TokenLogprob


@dataclass(frozen=True, slots=True)
class PlacedLogprob:
    """A token's log-probability and where its text begins, in characters of the output."""

    logprob: TokenLogprob
    text_offset: int


@dataclass(frozen=True, slots=True)
class OutputStep:
    """What one delta adds. `logprobs` are those of the tokens whose text is out by now."""

    text: str
    logprobs: list[PlacedLogprob]
    finish_reason: FinishReason | None


class OutputText:
    """`continues`: see Detokenizer. Stop strings count only behind the first `min_tokens` tokens."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        continues: Sequence[int] = (),
        stop: Sequence[str] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
    ) -> None:
        self._detokenizer = Detokenizer(tokenizer.pieces, continues=continues)
        self._checker = StopChecker(stop, include_stop=include_stop)
        self._min_tokens = min_tokens
        self._waiting: deque[tuple[int, PlacedLogprob]] = deque()  # (where the token's text ends, ...)
        self.num_tokens = 0
        self.num_chars = 0  # shown so far
        self.finish_reason: FinishReason | None = None

    def replay(self, token_ids: Sequence[int]) -> None:
        """Takes up the state behind these output ids, shown before; they did not end the sequence."""
        step = self.push(TokenDelta(request_id="", token_ids=list(token_ids)))
        assert step.finish_reason is None, "the replayed tokens contain a stop string"

    def push(self, delta: TokenDelta) -> OutputStep:
        """The text and log-probabilities that may be shown now. A stop string found ends the sequence with STOP."""
        assert self.finish_reason is None, "the sequence has ended"
        parts: list[str] = []
        reason = delta.finish_reason
        last = len(delta.token_ids) - 1
        for i, token_id in enumerate(delta.token_ids):
            self.num_tokens += 1
            if i == last and delta.stop_token_id is not None:
                break  # counted, but no part of the text
            offset, text = self._detokenizer.push_token(token_id)
            if delta.logprobs is not None:
                self._waiting.append((self._detokenizer.num_chars, PlacedLogprob(delta.logprobs[i], offset)))
            if self._take(parts, text):
                reason = FinishReason.STOP
                break
        if reason is not None:
            if self._checker.stop is None and not self._take(parts, self._detokenizer.flush()):
                parts.append(self._checker.flush())
            elif self._checker.stop is not None:
                reason = FinishReason.STOP
        text = "".join(parts)
        self.num_chars += len(text)
        self.finish_reason = reason
        return OutputStep(text, self._release(), reason)

    def _take(self, parts: list[str], text: str) -> bool:
        if self.num_tokens <= self._min_tokens:
            parts.append(text)
            return False
        shown, stopped = self._checker.push(text)
        parts.append(shown)
        return stopped

    def _release(self) -> list[PlacedLogprob]:
        released: list[PlacedLogprob] = []
        while self._waiting:
            end, placed = self._waiting[0]
            if self.finish_reason is None:
                if end > self.num_chars:
                    break
            elif self._checker.stop is not None and placed.text_offset >= self.num_chars:
                break  # the tokens of a stop string go with it
            released.append(placed)
            self._waiting.popleft()
        return released
