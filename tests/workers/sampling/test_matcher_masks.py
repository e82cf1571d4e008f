"""Where masks are computed: a slow one on a thread of low priority, and all of them the same wherever they are computed."""

import os
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from llguidance import LLMatcher
from support.paths import DEMO_MODEL

from workers.sampling.matcher_masks import MatcherMasks
from workers.sampling.native_threads import NativeThreads
from workers.sampling.vocabulary import load_grammar_tokenizer, new_matcher

VOCAB_SIZE = 4096
TOKENIZER = load_grammar_tokenizer(DEMO_MODEL / "tokenizer.model.v3", vocab_size=VOCAB_SIZE, eos_token_ids=[2])
# Its first mask takes milliseconds.
AMBIGUOUS = "start: s\ns: s s | " + " | ".join(f"x{i}" for i in range(60)) + "\n"
AMBIGUOUS += "\n".join(f"x{i}: /[a-z {i % 10}]/" for i in range(60))
linux_only = pytest.mark.skipif(
    sys.platform != "linux", reason="threads have priorities and clocks of their own on Linux"
)


def thread_ids() -> set[int]:
    return {int(task.name) for task in Path("/proc/self/task").iterdir()}


class Matching(NamedTuple):
    matcher: LLMatcher

    def fail(self) -> None:
        raise AssertionError("the mask could not be computed")


def new(grammar: str = AMBIGUOUS) -> Matching:
    return Matching(new_matcher(TOKENIZER, grammar))


@pytest.fixture(scope="module")
def masks() -> MatcherMasks[Matching]:
    return MatcherMasks(TOKENIZER, vocab_size=VOCAB_SIZE, num_slow_threads=1)


def test_a_mask_is_the_same_wherever_it_is_computed(masks: MatcherMasks[Matching]) -> None:
    grammars = [AMBIGUOUS, 'start: "red" | "green"', "start: /[0-9]+/"]
    expected = [
        np.frombuffer(new(grammar).matcher.compute_bitmask(), dtype=np.uint8)[: VOCAB_SIZE // 8] for grammar in grammars
    ]
    found, _ = masks.together([new(grammar) for grammar in grammars])
    for grammar, mask, wanted in zip(grammars, found, expected, strict=True):
        others = [masks.together([new(grammar)])[0][0], masks.alone(new(grammar))[0], masks.here(new(grammar))]
        assert all((other == wanted).all() for other in (mask, *others)), grammar


def test_the_cpu_time_of_masks_is_known(masks: MatcherMasks[Matching]) -> None:
    # The quickest of several: what else runs on the machine only adds to it.
    usual = min(masks.alone(new('start: "red"'))[1] for _ in range(5))
    for took_s in (masks.alone(new())[1], masks.together([new()])[1], masks.together([new(), new()])[1]):
        assert took_s > 5 * usual, f"an ambiguous grammar: {took_s}, a simple one: {usual}"


@linux_only
def test_a_mask_alone_uses_no_cpu_time_of_its_caller(masks: MatcherMasks[Matching]) -> None:
    """With a new llguidance: does it still compute two masks on the executor's threads? See the companion in matcher_masks.py."""
    constraint, begun = new(), time.thread_time()
    took_s = masks.alone(constraint)[1]
    assert time.thread_time() - begun < took_s / 2


@linux_only
def test_background_threads_have_a_low_priority_and_their_starter_keeps_its_own() -> None:
    """A quarter of the weight at most, as an idle thread or by niceness (1.25 a step)."""
    own = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    before = thread_ids()
    threads = NativeThreads(2, in_background=True)
    deadline = time.monotonic() + 10
    while len(new_ids := thread_ids() - before) > 2:  # the starter's thread ends
        assert time.monotonic() < deadline, "there are two threads"
    for thread_id in new_ids:
        is_idle = os.sched_getscheduler(thread_id) == os.SCHED_IDLE
        assert is_idle or os.getpriority(os.PRIO_PROCESS, thread_id) >= own + 7
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == own
    del threads
