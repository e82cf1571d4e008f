"""Grammars in the engine: a matcher for each request that has one, and the masks of a step.

Rank 0 only. Knows llguidance, numpy and request ids; no torch, no scheduling, no text. The engine thread hardly waits here: one thread
compiles grammars, the shortest first, and others compute masks (masks.py) while the model computes the logits that they apply to. A
matcher that hits one of workers.sampling.vocabulary's limits stays in error, and only its request ends; so does one that takes more CPU
time than a request may use.
"""

import itertools
import logging
import queue
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import NamedTuple

import numpy as np
from llguidance import LLTokenizer

from workers.device.cpu import usable_cores
from workers.errors import RequestError
from workers.sampling.masks import MaskLanes, StepMasks, is_held, is_slow
from workers.sampling.matcher_masks import MatcherMasks
from workers.sampling.vocabulary import load_grammar_tokenizer, new_matcher
from workers.thread_priority import QUARTER, lower_priority

log = logging.getLogger(__name__)

_UNUSABLE = "The grammar of structured_outputs cannot be used. Check it, or make it simpler."
_TOO_COMPLEX = "The grammar of structured_outputs became too complex to follow. Make it simpler or less ambiguous."
_TOO_SLOW = (
    "Following the grammar of structured_outputs took more than {:g} s of CPU time. Make it simpler or less ambiguous."
)
# Of CPU time that one request may use for slow masks, and to follow the tokens that another replica generated. With the limits of the
# parser, a slow mask takes 5 to 40 ms; the masks of usual grammars are not counted.
MAX_MASKS_S = 10.0
MAX_REPLAY_S = 5.0


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
        # See masks.py. The mask belongs to the tokens accepted so far.
        self.mask_s = 0.0
        self.is_suspect = False
        self.pending_mask: Future[np.ndarray] | None = None
        self._spent_s = 0.0
        self._check(_UNUSABLE)
        if token_ids:
            begun = time.thread_time()
            for token_id in token_ids:  # one by one: during a call no other thread runs
                self.matcher.consume_token(token_id)
                if time.thread_time() - begun > MAX_REPLAY_S:
                    self.error = _TOO_SLOW.format(MAX_REPLAY_S)
                    return
            self._check("The tokens of output_token_ids do not follow the grammar of structured_outputs.")
            if self.is_finished:
                self.error = "The tokens of output_token_ids end the grammar of structured_outputs already."

    def accept(self, token_id: int) -> None:
        """Adds the output's next token."""
        self.num_accepted += 1
        self.pending_mask = None
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
        self.pending_mask = None
        num_unconsumed = min(num_tokens, self._num_unconsumed)
        self._num_unconsumed -= num_unconsumed
        if self.matcher.is_error():
            return
        if num_unconsumed and not self._num_unconsumed:
            self.error = None
        if num_tokens > num_unconsumed:
            self.matcher.rollback(num_tokens - num_unconsumed)

    def abandon(self) -> None:
        """Its request has ended. A mask that no thread has begun is not computed."""
        if self.pending_mask is not None:
            self.pending_mask.cancel()

    def fail(self) -> None:
        """Puts the constraint in error: its mask could not be computed."""
        self.error = _TOO_COMPLEX

    def spend(self, cpu_s: float) -> None:
        """Counts the CPU time of a slow mask. Beyond the budget of a request, the constraint is in error."""
        self._spent_s += cpu_s
        if self._spent_s > MAX_MASKS_S and self.error is None:
            self.error = _TOO_SLOW.format(MAX_MASKS_S)

    @property
    def is_held(self) -> bool:
        """Whether its mask is being computed. It must not be touched, and its request cannot be part of a step."""
        return is_held(self)

    @property
    def is_slow(self) -> bool:
        """Whether its next mask will probably take longer than a step should wait."""
        return is_slow(self)

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
        self._compiling: dict[str, Future[Constraint]] = {}
        # Not lower: others wait for what it compiles, and it needs the GIL between two calls of llguidance.
        self._compiler = ThreadPoolExecutor(1, "grammar-compiler", initializer=lower_priority, initargs=(QUARTER,))
        self._to_compile: queue.PriorityQueue[tuple[int, int, _Job]] = queue.PriorityQueue()
        self._num_jobs = itertools.count()
        num_cpus = usable_cores()
        num_slow_threads = max(1, num_cpus // 4)
        self._compute: MatcherMasks[Constraint] = MatcherMasks(
            self._tokenizer, vocab_size=vocab_size, num_slow_threads=num_slow_threads
        )
        self._masks: MaskLanes[Constraint] = MaskLanes(
            self._compute, num_together=4 * num_cpus, num_slow_threads=num_slow_threads
        )

    @property
    def num_compiling(self) -> int:
        return len(self._compiling)

    def compile(self, request_id: str, grammar: str, output_token_ids: Sequence[int] = ()) -> None:
        """Starts to compile; `take_compiled` returns the outcome. Raises RequestError without a tokenizer."""
        if self._tokenizer is None:
            raise RequestError(
                "This replica has no tokenizer, which structured_outputs needs.", param="structured_outputs"
            )
        job = _Job(self._tokenizer, grammar, output_token_ids, Future())
        self._compiling[request_id] = job.outcome
        # The shortest first, so that a plain request does not wait until many long ones are compiled.
        self._to_compile.put((len(grammar) + len(output_token_ids), next(self._num_jobs), job))
        self._compiler.submit(self._compile_next)

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

    def begin_masks(self, constraints: Mapping[str, Constraint]) -> StepMasks | None:
        """Starts to compute which token may come next: bit i % 8 of byte i // 8 is token i. None without constraints.

        No constraint may be touched until `StepMasks.take` has returned its mask. The mask of one that is in error means nothing.
        """
        return self._masks.begin(constraints) if constraints else None

    def prepare_mask(self, constraint: Constraint) -> None:
        """After a token was accepted: a mask that will take long starts now."""
        self._masks.prepare(constraint)

    def wait_for_any(self, held: Sequence[Constraint], timeout_s: float) -> None:
        """Returns when one of these constraints is no longer held, or after `timeout_s`."""
        self._masks.wait_for_any(held, timeout_s)

    def close(self) -> None:
        """Ends the threads once they have finished the work at hand."""
        self._compiler.shutdown(wait=False, cancel_futures=True)
        self._masks.close()

    def _compile_next(self) -> None:
        _, _, job = self._to_compile.get_nowait()
        if not job.outcome.set_running_or_notify_cancel():
            return
        try:
            # Sequences with the same grammar do not share one either: copies of a matcher share a lock, and one's slow mask holds it.
            constraint = Constraint(job.tokenizer, job.grammar, job.output_token_ids)
            if constraint.error is None:
                begun = time.thread_time()
                mask = self._compute.here(constraint)
                constraint.mask_s = time.thread_time() - begun
                constraint.pending_mask = Future()
                constraint.pending_mask.set_result(mask)
        except BaseException as e:  # a panic in native code is not an Exception; the request waits for an outcome
            job.outcome.set_exception(e)
        else:
            job.outcome.set_result(constraint)


class _Job(NamedTuple):
    tokenizer: LLTokenizer
    grammar: str
    output_token_ids: Sequence[int]
    outcome: "Future[Constraint]"
