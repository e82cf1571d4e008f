"""Grammars in the engine: a matcher for each request that has one, and the masks of a step.

Rank 0 only. Knows llguidance, numpy and request ids; no torch, no scheduling, no text. The engine thread hardly waits here: one thread
compiles grammars, another computes masks while the model computes the logits that they apply to. A matcher that hits one of
workers.sampling.vocabulary's limits stays in error, and only its request ends.
"""

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import NamedTuple

import numpy as np
from llguidance import LLExecutor, LLTokenizer
from llguidance.numpy import fill_next_token_bitmask_par, get_bitmask_shape

from workers.errors import RequestError
from workers.sampling.vocabulary import load_grammar_tokenizer, new_matcher

log = logging.getLogger(__name__)

_UNUSABLE = "The grammar of structured_outputs cannot be used. Check it, or make it simpler."
_TOO_COMPLEX = "The grammar of structured_outputs became too complex to follow. Make it simpler or less ambiguous."


class Constraint:
    """Where one output stands in its grammar. A function of the grammar and the accepted tokens, so it can be rebuilt anywhere.

    `error` is a message for the user once the grammar cannot be followed any further.
    """

    def __init__(self, tokenizer: LLTokenizer, grammar: str, token_ids: Sequence[int] = ()) -> None:
        """token_ids: the output so far."""
        self.error: str | None = None
        self.matcher = new_matcher(tokenizer, grammar)
        self.num_accepted = len(token_ids)
        # The last accepted tokens that the matcher did not consume, because the first of them does not follow the grammar.
        self._num_unconsumed = 0
        self._check(_UNUSABLE)
        if token_ids:
            for token_id in token_ids:  # one by one: during a call no other thread runs
                self.matcher.consume_token(token_id)
            self._check("The tokens of output_token_ids do not follow the grammar of structured_outputs.")
            if self.is_finished:
                self.error = "The tokens of output_token_ids end the grammar of structured_outputs already."

    def accept(self, token_id: int) -> None:
        """Adds the output's next token."""
        self.num_accepted += 1
        # The mask under which this token was chosen may have exceeded a limit already.
        self._check(_TOO_COMPLEX)
        if self.error is None and not self.matcher.try_consume_tokens([token_id]):
            self.error = _TOO_COMPLEX
        if self.error is not None:
            self._num_unconsumed += 1

    def rollback(self, num_tokens: int) -> None:
        """Forgets the last `num_tokens` accepted tokens, an end of text among them too.

        An error is forgotten along with the token that did not follow the grammar. A limit that was exceeded is a lasting error.
        """
        assert 0 <= num_tokens <= self.num_accepted, (
            f"rollback of {num_tokens} tokens, {self.num_accepted} were accepted"
        )
        self.num_accepted -= num_tokens
        num_unconsumed = min(num_tokens, self._num_unconsumed)
        self._num_unconsumed -= num_unconsumed
        if self.matcher.is_error():
            return
        if num_unconsumed and not self._num_unconsumed:
            self.error = None
        if num_tokens > num_unconsumed:
            self.matcher.rollback(num_tokens - num_unconsumed)

    def fail(self) -> None:
        """Puts the constraint in error: its mask could not be computed."""
        self.error = _TOO_COMPLEX

    @property
    def is_finished(self) -> bool:
        """Whether no text can follow."""
        return self.error is None and self.matcher.is_stopped()

    def _check(self, message: str) -> None:
        if self.error is None and self.matcher.is_error():
            self.error = message


class Compiled(NamedTuple):
    """The outcome of compiling one request's grammar: a constraint, or a message for the user that says why there is none."""

    request_id: str
    constraint: Constraint | None
    error: str | None


class Grammars:
    """All grammars of one engine. Methods belong to the engine thread."""

    def __init__(self, tokenizer_path: str | None, *, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        """Without a tokenizer, `compile` refuses every grammar. Raises ConfigError for a file that is not a tokenizer."""
        self._tokenizer: LLTokenizer | None = None
        if tokenizer_path is not None:
            self._tokenizer = load_grammar_tokenizer(tokenizer_path, vocab_size=vocab_size, eos_token_ids=eos_token_ids)
        self._vocab_size = vocab_size
        self._compiling: dict[str, Future[Constraint]] = {}
        self._compiler = ThreadPoolExecutor(1, "grammar-compiler")
        self._masker = ThreadPoolExecutor(1, "grammar-masks")
        self._executor = LLExecutor()

    @property
    def num_compiling(self) -> int:
        return len(self._compiling)

    def compile(self, request_id: str, grammar: str, output_token_ids: Sequence[int] = ()) -> None:
        """Starts to compile; `take_compiled` returns the outcome. Raises RequestError without a tokenizer."""
        if self._tokenizer is None:
            raise RequestError(
                "This replica has no tokenizer, which structured_outputs needs.", param="structured_outputs"
            )
        self._compiling[request_id] = self._compiler.submit(Constraint, self._tokenizer, grammar, output_token_ids)

    def take_compiled(self, *, timeout_s: float = 0.0) -> list[Compiled]:
        """The outcomes since the last call, in the order of the calls of `compile`. Waits up to `timeout_s` for the first."""
        if self._compiling and timeout_s:
            wait(self._compiling.values(), timeout_s, FIRST_COMPLETED)
        done = [(request_id, future) for request_id, future in self._compiling.items() if future.done()]
        outcomes = []
        for request_id, future in done:
            del self._compiling[request_id]
            failure = future.exception()
            if failure is not None:  # not one of the errors that a matcher keeps to itself
                log.error("The grammar of request %s could not be compiled: %s", request_id, failure)
                outcomes.append(Compiled(request_id, None, _UNUSABLE))
                continue
            constraint = future.result()
            outcomes.append(Compiled(request_id, constraint, constraint.error))
        return outcomes

    def forget(self, request_id: str) -> bool:
        """Whether the request's grammar was being compiled; `take_compiled` will not return it then."""
        future = self._compiling.pop(request_id, None)
        if future is not None:
            future.cancel()
        return future is not None

    def begin_masks(self, constraints: Mapping[str, Constraint]) -> "Future[dict[str, np.ndarray]] | None":
        """Starts to compute which token may come next: by request id, bit i % 8 of byte i // 8 is token i. None without constraints.

        No constraint may be touched until the result is there. The mask of one that is in error means nothing.
        """
        return self._masker.submit(self._masks, constraints) if constraints else None

    def close(self) -> None:
        """Ends the threads once they have finished the work at hand."""
        self._compiler.shutdown(wait=False, cancel_futures=True)
        self._masker.shutdown(wait=False)

    def _masks(self, constraints: Mapping[str, Constraint]) -> dict[str, np.ndarray]:
        masks = np.zeros(get_bitmask_shape(len(constraints), self._vocab_size), dtype=np.int32)
        rows = [(constraint.matcher, i) for i, constraint in enumerate(constraints.values())]
        try:
            fill_next_token_bitmask_par(self._executor, rows, masks)
        except BaseException as e:  # a panic in native code is not an Exception; it must not end the engine
            log.error("The masks of a step could not be computed together: %r", e)
            self._compute_each(constraints, masks)
        return dict(zip(constraints, masks.view(np.uint8), strict=True))

    def _compute_each(self, constraints: Mapping[str, Constraint], masks: np.ndarray) -> None:
        """One by one, so that only the constraint that cannot be computed fails."""
        for i, constraint in enumerate(constraints.values()):
            try:
                fill_next_token_bitmask_par(self._executor, [(constraint.matcher, 0)], masks[i : i + 1])
            except BaseException as e:
                log.error("A mask could not be computed: %r", e)
                constraint.fail()
