"""Computes the masks of llguidance's matchers: on the calling thread, on several native ones, or on native ones in the background.

Knows llguidance and numpy; not when which mask is due (masks.py). Bit i % 8 of byte i // 8 of a mask is token i.
"""

import logging
import queue
import time
from collections.abc import Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from llguidance.numpy import fill_next_token_bitmask, fill_next_token_bitmask_par, get_bitmask_shape

from workers.sampling.native_threads import NativeThreads
from workers.sampling.vocabulary import new_matcher

_TRIVIAL = 'start: "a"'

log = logging.getLogger(__name__)


class Matching(Protocol):
    """`fail` is called when its mask cannot be computed; the mask means nothing then."""

    matcher: LLMatcher

    def fail(self) -> None: ...


MatchingT = TypeVar("MatchingT", bound=Matching, contravariant=True)


class MatcherMasks(Generic[MatchingT]):
    """A ComputeMasks (masks.py). Without a tokenizer there are no matchers, and nothing may be computed."""

    def __init__(self, tokenizer: LLTokenizer | None, *, vocab_size: int, num_slow_threads: int) -> None:
        self._vocab_size = vocab_size
        self._quick = NativeThreads()
        self._background: queue.SimpleQueue[_Background] = queue.SimpleQueue()
        if tokenizer is not None:
            for _ in range(num_slow_threads):
                self._background.put(
                    _Background(NativeThreads(1, in_background=True), new_matcher(tokenizer, _TRIVIAL))
                )

    def together(self, constraints: Sequence[MatchingT]) -> tuple[list[np.ndarray], float]:
        """The masks, and the CPU time that they took."""
        # llguidance computes a single mask on the calling thread.
        begun = self._quick.cpu_time() + time.thread_time()
        masks = self._masks(constraints, self._quick)
        return masks, self._quick.cpu_time() + time.thread_time() - begun

    def alone(self, constraint: MatchingT) -> tuple[np.ndarray, float]:
        """The mask, and the CPU time that it took, on a thread of low priority."""
        background = self._background.get()
        try:
            begun = background.threads.cpu_time()
            mask = self._masks([constraint], background.threads, companions=[background.companion])[0]
            return mask, background.threads.cpu_time() - begun
        finally:
            self._background.put(background)

    def here(self, constraint: MatchingT) -> np.ndarray:
        """The mask, computed on the calling thread."""
        mask = np.zeros(get_bitmask_shape(1, self._vocab_size), dtype=np.int32)
        try:
            fill_next_token_bitmask(constraint.matcher, mask)
        except BaseException as e:  # a panic in native code is not an Exception; only this constraint fails
            log.error("A mask could not be computed: %r", e)
            constraint.fail()
        row: np.ndarray = mask.view(np.uint8)[0]
        return row

    def _masks(
        self, constraints: Sequence[MatchingT], threads: NativeThreads, *, companions: Sequence[LLMatcher] = ()
    ) -> list[np.ndarray]:
        matchers = [*(constraint.matcher for constraint in constraints), *companions]
        masks = np.zeros(get_bitmask_shape(len(matchers), self._vocab_size), dtype=np.int32)
        try:
            fill_next_token_bitmask_par(threads.executor, [(matcher, i) for i, matcher in enumerate(matchers)], masks)
        except BaseException as e:  # a panic in native code; it must not end the engine
            log.error("%s masks could not be computed together: %r", len(constraints), e)
            return [self.here(constraint) for constraint in constraints]
        return list(masks.view(np.uint8)[: len(constraints)])


class _Background(NamedTuple):
    """`companion`: a matcher whose mask costs nothing. llguidance computes on the executor's threads from two masks on."""

    threads: NativeThreads
    companion: LLMatcher
