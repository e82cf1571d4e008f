"""Grammars in the engine: a matcher for each request that has one, and the masks of a step.

Rank 0 only. Knows llguidance, numpy and Request; no torch, no scheduling, no text. The engine thread waits for
little here: grammars are compiled on one thread, masks are computed on another while the model computes the logits they are for.
A matcher that meets one of workers.sampling.vocabulary's limits is in error for good, and its request ends alone.
"""

import logging
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

import numpy as np
from llguidance import LLExecutor, LLTokenizer
from llguidance.numpy import fill_next_token_bitmask_par, get_bitmask_shape

from workers.engine.request import Request
from workers.errors import RequestError
from workers.sampling.vocabulary import load_grammar_tokenizer, new_matcher

log = logging.getLogger(__name__)

_UNUSABLE = "The grammar of structured_outputs cannot be used; check it, or make it simpler."
_TOO_COMPLEX = "The grammar of structured_outputs became too complex to follow; make it simpler or less ambiguous."


class Constraint:
    """Where one output stands in its grammar. A function of the grammar and the tokens accepted, so that it can be rebuilt anywhere.

    `error` is a sentence for the user once the grammar cannot be followed any further.
    """

    def __init__(self, tokenizer: LLTokenizer, grammar: str, token_ids: Sequence[int] = ()) -> None:
        """token_ids: the output so far."""
        self.error: str | None = None
        self.matcher = new_matcher(tokenizer, grammar)
        self._check(_UNUSABLE)
        if token_ids:
            for token_id in token_ids:  # one by one: within a call no other thread runs
                self.matcher.consume_token(token_id)
            self._check("The tokens of output_token_ids do not follow the grammar of structured_outputs.")
            if self.is_finished:
                self.error = "The tokens of output_token_ids end the grammar of structured_outputs already."

    def accept(self, token_id: int) -> None:
        """The output's next token."""
        self._check(_TOO_COMPLEX)  # the mask that this token was chosen under may have been too much already
        if self.error is None:
            self.matcher.consume_token(token_id)
            self._check(_TOO_COMPLEX)

    @property
    def is_finished(self) -> bool:
        """Whether no text can follow."""
        return self.error is None and self.matcher.is_stopped()

    def _check(self, sentence: str) -> None:
        if self.error is None and self.matcher.is_error():
            self.error = sentence


class Grammars:
    """All grammars of one engine. Methods belong to the engine thread."""

    def __init__(self, tokenizer_path: str | None, *, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        """Without a tokenizer, requests with a grammar are refused. Raises ConfigError."""
        self._tokenizer: LLTokenizer | None = None
        if tokenizer_path is not None:
            self._tokenizer = load_grammar_tokenizer(tokenizer_path, vocab_size=vocab_size, eos_token_ids=eos_token_ids)
        self._vocab_size = vocab_size
        self._compiling: dict[str, tuple[Request, Future[Constraint]]] = {}
        self._compiler = ThreadPoolExecutor(1, "grammar-compiler")
        self._masker = ThreadPoolExecutor(1, "grammar-masks")
        self._executor = LLExecutor()

    @property
    def num_compiling(self) -> int:
        return len(self._compiling)

    def compile(self, request: Request) -> None:
        """Begins to make the request's constraint; `take_compiled` will give the request back. Raises RequestError."""
        assert request.sampling.grammar is not None, "only a request with a grammar has one to compile"
        if self._tokenizer is None:
            raise RequestError(
                "This replica has no tokenizer, which structured_outputs needs.", param="structured_outputs"
            )
        output = request.token_ids[request.num_prompt_tokens :]
        future = self._compiler.submit(Constraint, self._tokenizer, request.sampling.grammar, output)
        self._compiling[request.request_id] = (request, future)

    def take_compiled(self, *, timeout_s: float = 0.0) -> list[tuple[Request, str | None]]:
        """The requests whose grammar is compiled by now, in the order of their coming, each with a sentence where it cannot be used.

        Waits for one as long as `timeout_s`.
        """
        if self._compiling and timeout_s:
            wait([future for _, future in self._compiling.values()], timeout_s, FIRST_COMPLETED)
        done = [(request, future) for request, future in self._compiling.values() if future.done()]
        outcomes: list[tuple[Request, str | None]] = []
        for request, future in done:
            del self._compiling[request.request_id]
            failure = future.exception()
            if failure is not None:  # not one of the errors that a matcher keeps to itself
                log.error("The grammar of request %s could not be compiled: %s", request.request_id, failure)
                outcomes.append((request, _UNUSABLE))
                continue
            request.constraint = future.result()
            outcomes.append((request, request.constraint.error))
        return outcomes

    def forget(self, request: Request) -> bool:
        """Whether the request was waiting here; it never comes out then."""
        waiting = self._compiling.pop(request.request_id, None)
        if waiting is not None:
            waiting[1].cancel()
        return waiting is not None

    def begin_masks(self, requests: Sequence[Request]) -> "Future[dict[str, np.ndarray]] | None":
        """By request id, what may come next in those that have a grammar: bit i % 8 of byte i // 8 is token i. None without any.

        No constraint may be touched before the result is there. The mask of one that is in error means nothing.
        """
        constraints = {r.request_id: r.constraint for r in requests if r.constraint is not None}
        return self._masker.submit(self._masks, constraints) if constraints else None

    def close(self) -> None:
        """Ends the threads, once they are through with what they have."""
        self._compiler.shutdown(wait=False, cancel_futures=True)
        self._masker.shutdown(wait=False)

    def _masks(self, constraints: dict[str, Constraint]) -> dict[str, np.ndarray]:
        masks = np.zeros(get_bitmask_shape(len(constraints), self._vocab_size), dtype=np.int32)
        rows = [(constraint.matcher, i) for i, constraint in enumerate(constraints.values())]
        try:
            fill_next_token_bitmask_par(self._executor, rows, masks)
        except BaseException as e:  # a panic in native code is no Exception; it must not end the engine
            log.error("The masks of a step could not be computed together: %r", e)
            self._masks_alone(constraints, masks)
        return dict(zip(constraints, masks.view(np.uint8), strict=True))

    def _masks_alone(self, constraints: dict[str, Constraint], masks: np.ndarray) -> None:
        """One by one, so that only the guilty fails."""
        for i, constraint in enumerate(constraints.values()):
            try:
                fill_next_token_bitmask_par(self._executor, [(constraint.matcher, 0)], masks[i : i + 1])
            except BaseException as e:
                log.error("A mask could not be computed: %r", e)
                constraint.error = _TOO_COMPLEX
