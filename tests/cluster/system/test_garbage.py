"""Garbage collection after a start."""

import gc
import weakref

import pytest

from cluster.system.garbage import NEW_OBJECTS, collect_garbage_rarely


class Node:
    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def as_before():
    thresholds = gc.get_threshold()
    yield
    gc.unfreeze()
    gc.set_threshold(*thresholds)


def test_what_existed_is_not_visited_again_and_later_cycles_are_freed():
    before = weakref.ref(Node())
    collect_garbage_rarely()
    after = weakref.ref(Node())
    gc.collect()
    assert before() is not None
    assert after() is None
    assert gc.get_threshold()[0] == NEW_OBJECTS
