"""One sequence's way from token deltas to what may be shown: text, tool calls and log-probability positions.

Knows what a gateway must remember about a sequence. All of it follows from the arguments and the output ids so far, so that
`replay` rebuilds it on another gateway (the ids of calls are random, and went out with the call's first piece).
Behind the token [TOOL_CALLS] the output is calls: no stop strings apply, and its tokens have no log-probabilities, which OpenAI
defines for the content only. Knows no HTTP and no replica.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from cluster.text.output.detokenizer import Detokenizer
from cluster.text.output.stop_strings import StopChecker
from cluster.text.tokenizer import Tokenizer
from cluster.text.tools.calls import ToolCallDelta, ToolCallParser, new_tool_call_id
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
    tool_calls: list[ToolCallDelta] = field(default_factory=list)


class OutputText:
    """`continues`: see Detokenizer. Stop strings count only behind the first `min_tokens` tokens.

    `shows_end`: a stop token, which is no part of the text, has its log-probability among the others'.
    `tool_calls_token_id`: the token behind which tool calls stand; None where no tools are offered, all is text then.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        continues: Sequence[int] = (),
        stop: Sequence[str] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
        tool_calls_token_id: int | None = None,
        shows_end: bool = False,
        new_tool_call_id: Callable[[], str] = new_tool_call_id,
    ) -> None:
        self._pieces = tokenizer.pieces
        self._detokenizer = Detokenizer(tokenizer.pieces, continues=continues)
        self._checker = StopChecker(stop, include_stop=include_stop)
        self._min_tokens = min_tokens
        self._shows_end = shows_end
        self._tool_calls_token_id = tool_calls_token_id
        self._new_tool_call_id = new_tool_call_id
        self._parser: ToolCallParser | None = None  # from the token on
        self._waiting: deque[tuple[int, PlacedLogprob]] = deque()  # (where the token's text ends, ...)
        self.num_tokens = 0
        self.num_chars = 0  # shown so far
        self.finish_reason: FinishReason | None = None

    @property
    def called_tools(self) -> bool:
        """Whether the output so far calls a tool."""
        return self._parser is not None and self._parser.num_calls > 0

    def replay(self, token_ids: Sequence[int]) -> None:
        """Takes up the state behind these output ids, shown before; they did not end the sequence."""
        step = self.push(TokenDelta(request_id="", token_ids=list(token_ids)))
        assert step.finish_reason is None, "the replayed tokens contain a stop string"

    def push(self, delta: TokenDelta) -> OutputStep:
        """The text and log-probabilities that may be shown now. A stop string found ends the sequence with STOP."""
        assert self.finish_reason is None, "the sequence has ended"
        parts: list[str] = []
        calls: list[ToolCallDelta] = []
        reason = delta.finish_reason
        last = len(delta.token_ids) - 1
        for i, token_id in enumerate(delta.token_ids):
            self.num_tokens += 1
            if i == last and delta.stop_token_id is not None:
                if self._shows_end and delta.logprobs is not None:
                    end = self._detokenizer.num_chars
                    self._waiting.append((end, PlacedLogprob(delta.logprobs[i], end)))
                break  # counted, but no part of the text
            if self._parser is None and token_id == self._tool_calls_token_id:
                if self._end_text(parts):
                    reason = FinishReason.STOP
                    break
                self._parser = ToolCallParser(new_id=self._new_tool_call_id)
                self._detokenizer = Detokenizer(self._pieces)
            if self._parser is not None:
                self._take_calls(parts, calls, self._detokenizer.push_token(token_id)[1])
                continue
            offset, text = self._detokenizer.push_token(token_id)
            if delta.logprobs is not None:
                self._waiting.append((self._detokenizer.num_chars, PlacedLogprob(delta.logprobs[i], offset)))
            if self._take(parts, text):
                reason = FinishReason.STOP
                break
        if reason is not None:
            if self._parser is not None:
                self._take_calls(parts, calls, self._detokenizer.flush())
            elif self._end_text(parts):
                reason = FinishReason.STOP
        text = "".join(parts)
        self.num_chars += len(text)
        self.finish_reason = reason
        return OutputStep(text, self._release(), reason, calls)

    def _end_text(self, parts: list[str]) -> bool:
        """No text follows: what was held back comes out. Whether a stop string ended it."""
        if self._checker.stop is None and not self._take(parts, self._detokenizer.flush()):
            parts.append(self._checker.flush())
        return self._checker.stop is not None

    def _take_calls(self, parts: list[str], calls: list[ToolCallDelta], text: str) -> None:
        assert self._parser is not None
        shown, deltas = self._parser.push(text)
        parts.append(shown)
        calls += deltas

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
