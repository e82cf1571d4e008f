"""Net changes of a set: a reader that applies what `take` returns has the current set."""

import random

from workers.kv_cache.diff import CacheDiff
from workers.protocol import CacheEvents


def test_changes_that_cancel_out_are_not_reported():
    diff = CacheDiff()
    diff.store(b"a")
    diff.evict(b"a")  # before a reader heard of it
    diff.evict(b"b")
    diff.store(b"b")  # known, and still there
    assert diff.take() is None


def test_each_change_is_reported_once_and_in_the_order_of_storing():
    diff = CacheDiff()
    for name in (b"c", b"a", b"b"):
        diff.store(name)
    diff.evict(b"x")
    assert diff.take() == CacheEvents(stored=[b"c", b"a", b"b"], evicted=[b"x"])
    assert diff.take() is None


def test_diffs_added_up_come_to_the_same_as_each_in_turn():
    rng = random.Random(0)
    names = [bytes([i]) for i in range(12)]
    actual: set[bytes] = set()
    step, total = CacheDiff(), CacheDiff()  # as in the block pool, and in a connection that seldom gets a frame
    follows_steps: set[bytes] = set()
    follows_total: set[bytes] = set()
    for _ in range(3000):
        name = rng.choice(names)
        if name in actual:
            actual.remove(name)
            step.evict(name)
        else:
            actual.add(name)
            step.store(name)
        if rng.random() < 0.3 and (events := step.take()):
            follows_steps = follows_steps - set(events.evicted) | set(events.stored)
            assert follows_steps == actual
            total.add(events)
            if rng.random() < 0.2 and (events := total.take()):
                assert not set(events.evicted) & set(events.stored)
                follows_total = follows_total - set(events.evicted) | set(events.stored)
                assert follows_total == actual


def test_without_a_reader_it_holds_no_more_than_the_set_itself():
    diff = CacheDiff()
    for i in range(10_000):
        diff.store(i.to_bytes(4, "big"))
        if i >= 10:
            diff.evict((i - 10).to_bytes(4, "big"))
    events = diff.take()
    assert events is not None
    assert (len(events.stored), events.evicted) == (10, [])
