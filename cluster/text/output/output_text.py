"""Turns the token deltas of one sequence into what the client sees: text, tool calls and the positions of log-probabilities.

Holds what a gateway must remember about a sequence. All of it follows from the arguments and the output ids so far, so `replay` can
rebuild it on another gateway (except the random ids of tool calls, which were sent with the first piece of each call).
After the token [TOOL_CALLS], between the tags of a call, and where the model thinks, stop strings do not apply, and tokens have no
log-probabilities, which OpenAI defines for the content only. Knows no HTTP and no replica.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cluster.text.output.detokenizer import Detokenizer
from cluster.text.output.stop_strings import StopChecker
from cluster.text.output.thoughts import ThoughtReader, think_token_ids
from cluster.text.tokenizer import Tokenizer
from cluster.text.tools.calls import ToolCallDelta, new_tool_call_id
from cluster.text.tools.named_calls import ARGS, CALL_ID, CALLS
from cluster.text.tools.reader import CallReader
from cluster.text.tools.tagged_calls import CLOSE, OPEN, TaggedCallReader
from workers.protocol import FinishReason, TokenDelta, TokenLogprob


@dataclass(frozen=True, slots=True)
class PlacedLogprob:
    """A token's log-probability and where its text starts, in characters of the output."""

    logprob: TokenLogprob
    text_offset: int


@dataclass(slots=True)
class OutputStep:
    """What one delta adds. `logprobs`: of the tokens whose text is now complete. `thoughts` come before the text.

    Never changes: it is not frozen, because that takes three times as long to make, and each token makes one.
    """

    text: str
    logprobs: list[PlacedLogprob]
    finish_reason: FinishReason | None
    tool_calls: Sequence[ToolCallDelta] = ()
    thoughts: str = ""

    @property
    def is_text(self) -> bool:
        """Whether it has text and nothing else, besides log-probabilities."""
        return bool(self.text) and self.finish_reason is None and not self.tool_calls and not self.thoughts


class OutputText:
    """The visible output of one sequence.

    continues: see Detokenizer. min_tokens: stop strings apply only after this many tokens. shows_end: also return the log-probability
    of a stop token, which has no text. include_stop: show the stop string or stop token that ended the output. shows_special: special
    tokens are text too, except within tool calls. tool_calls_token_id: the token that comes before tool calls; None if no tools are
    offered, and all output is text. call_tags: calls stand between tags instead (tools/tagged_calls.py). reads_thoughts: what the model
    thinks is kept apart, see thoughts.py; without effect on vocabularies without the tokens for it, and where special tokens are shown.
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
        call_tags: bool = False,
        shows_end: bool = False,
        shows_special: bool = False,
        reads_thoughts: bool = False,
        new_tool_call_id: Callable[[], str] = new_tool_call_id,
    ) -> None:
        self._pieces = tokenizer.pieces  # of tool calls
        shown = tokenizer.shown_pieces(shows_special=shows_special)
        self._detokenizer = Detokenizer(shown, continues=continues)
        self._include_stop = include_stop
        self._checker = StopChecker(stop, include_stop=include_stop)
        # Special tokens among the stop strings, which show even if other special tokens do not.
        ids = {tokenizer.control_token_id(name): name for name in stop} if include_stop else {}
        self._named_stops = {token_id: name for token_id, name in ids.items() if token_id is not None}
        self._min_tokens = min_tokens
        self._shows_end = shows_end
        self._tool_calls_token_id = tool_calls_token_id
        self._new_tool_call_id = new_tool_call_id
        self._parser: CallReader | None = None  # set once that token was seen
        # The control tokens inside calls, of vocabularies that have them.
        names = () if tool_calls_token_id is None else (CALLS, CALL_ID, ARGS)
        marks = {tokenizer.control_token_id(name): name for name in names}
        self._call_marks = {token_id: name for token_id, name in marks.items() if token_id is not None}
        self._tags = TaggedCallReader(new_id=new_tool_call_id) if call_tags else None
        # A tag may be a control token, which has no text of its own.
        named = {tokenizer.control_token_id(tag): tag for tag in (OPEN, CLOSE)} if call_tags else {}
        self._tag_tokens = {token_id: tag for token_id, tag in named.items() if token_id is not None}
        ids_of_thoughts = think_token_ids(tokenizer) if reads_thoughts and not shows_special else None
        self._thoughts = None if ids_of_thoughts is None else ThoughtReader(tokenizer, token_ids=ids_of_thoughts)
        # Nothing is looked for in the text, and no token begins or ends anything but the output.
        self._only_text = not stop and tool_calls_token_id is None and self._tags is None and self._thoughts is None
        self._waiting: deque[tuple[int, PlacedLogprob]] = deque()  # (where the token's text ends, ...)
        self.num_tokens = 0
        self.num_chars = 0  # shown so far
        self.finish_reason: FinishReason | None = None

    @property
    def is_only_text(self) -> bool:
        """Whether only a delta with a finish_reason can end it."""
        return self._only_text

    @property
    def called_tools(self) -> bool:
        """Whether the output so far calls a tool."""
        reader = self._parser or self._tags
        return reader is not None and reader.num_calls > 0

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the output."""
        return self._checker.stop

    def replay(self, token_ids: Sequence[int]) -> None:
        """Restores the state after these output ids, which were already shown and did not end the sequence."""
        step = self.push(TokenDelta(request_id="", token_ids=list(token_ids)))
        assert step.finish_reason is None, "the replayed tokens contain a stop string"

    def push(self, delta: TokenDelta) -> OutputStep:
        """The text, tool calls and log-probabilities that are final now. A stop string ends the sequence with STOP."""
        assert self.finish_reason is None, "the sequence has ended"
        if self._only_text and delta.finish_reason is None and delta.logprobs is None and not self._waiting:
            # The usual case, at a fraction of the cost of what follows.
            text = self._detokenizer.push(delta.token_ids)
            self.num_tokens += len(delta.token_ids)
            self.num_chars += len(text)
            return OutputStep(text, [], None)
        parts: list[str] = []
        calls: list[ToolCallDelta] = []
        thoughts: list[str] = []
        reason = delta.finish_reason
        last = len(delta.token_ids) - 1
        shown_end = ""
        for i, token_id in enumerate(delta.token_ids):
            self.num_tokens += 1
            if i == last and delta.stop_token_id is not None:
                end = self._detokenizer.num_chars
                if self._include_stop and self._parser is None:
                    end, shown_end = self._detokenizer.push_token(token_id)
                    shown_end = self._named_stops.get(token_id, shown_end)
                if self._shows_end and delta.logprobs is not None:
                    self._waiting.append((end, PlacedLogprob(delta.logprobs[i], end)))
                break  # counted, and part of the text only if asked for
            if self._parser is None and token_id == self._tool_calls_token_id:
                thoughts.append(self._end_thoughts())
                if self._end_text(parts):
                    reason = FinishReason.STOP
                    break
                self._parser = CallReader(names=ARGS in self._call_marks.values(), new_id=self._new_tool_call_id)
                self._detokenizer = Detokenizer(self._pieces)
                continue
            if self._parser is not None:
                if token_id in self._call_marks:
                    self._push_calls(parts, calls, self._detokenizer.flush())
                    calls += self._parser.mark(self._call_marks[token_id])
                    continue
                self._push_calls(parts, calls, self._detokenizer.push_token(token_id)[1])
                continue
            thought = None if self._thoughts is None else self._thoughts.push(token_id)
            if thought is not None:
                thoughts.append(thought)
                continue
            offset, text = self._detokenizer.push_token(token_id)
            if self._tags is not None:
                text, found = self._tags.push(text + self._tag_tokens.get(token_id, ""))
                calls += found
            if delta.logprobs is not None and not self._in_or_after_calls:
                self._waiting.append((self._detokenizer.num_chars, PlacedLogprob(delta.logprobs[i], offset)))
            if self._push_text(parts, text):
                reason = FinishReason.STOP
                break
        if self._tags is not None and self._in_or_after_calls:
            self._drop_logprobs_of_tags(len("".join(parts)))
        if reason is not None:
            thoughts.append(self._end_thoughts())
            if self._parser is not None:
                self._push_calls(parts, calls, self._detokenizer.flush())
            elif self._end_text(parts):
                reason = FinishReason.STOP
            else:
                parts.append(shown_end)
        text = "".join(parts)
        self.num_chars += len(text)
        self.finish_reason = reason
        return OutputStep(text, self._release(), reason, calls, "".join(thoughts))

    def _end_thoughts(self) -> str:
        return "" if self._thoughts is None else self._thoughts.flush()

    def _end_text(self, parts: list[str]) -> bool:
        """Adds the text that was held back, since no text follows. Returns whether it contains a stop string."""
        rest = self._detokenizer.flush()
        if self._tags is not None:
            rest = self._tags.push(rest)[0] + self._tags.flush()
        if self._checker.stop is None and not self._push_text(parts, rest):
            parts.append(self._checker.flush())
        return self._checker.stop is not None

    def _push_calls(self, parts: list[str], calls: list[ToolCallDelta], text: str) -> None:
        assert self._parser is not None
        shown, deltas = self._parser.push(text)
        parts.append(shown)
        calls += deltas

    def _push_text(self, parts: list[str], text: str) -> bool:
        if self.num_tokens <= self._min_tokens:
            parts.append(text)
            return False
        shown, stopped = self._checker.push(text)
        parts.append(shown)
        return stopped

    @property
    def _in_or_after_calls(self) -> bool:
        return self._tags is not None and (self._tags.is_open or self._tags.num_calls > 0)

    def _drop_logprobs_of_tags(self, num_new_chars: int) -> None:
        """Those of tokens that have turned out to be the beginning of a tag."""
        shown = self.num_chars + num_new_chars
        while self._waiting and self._waiting[-1][0] > shown:
            self._waiting.pop()

    def _release(self) -> list[PlacedLogprob]:
        released: list[PlacedLogprob] = []
        while self._waiting:
            end, placed = self._waiting[0]
            if self.finish_reason is None:
                if end > self.num_chars:
                    break
            elif self._checker.stop is not None and placed.text_offset >= self.num_chars:
                break  # the tokens of a stop string are dropped with it
            released.append(placed)
            self._waiting.popleft()
        return released
