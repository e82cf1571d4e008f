"""When masks are computed: a slow one holds its own request only, and uses up its request's budget. The only clock is a fake's."""

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from types import SimpleNamespace

import numpy as np

from workers.sampling import masks as masks_module
from workers.sampling.masks import SLOW_MASK_S, MaskLanes, is_held, is_slow

MASK = np.ones(1, dtype=np.uint8)


class FakeConstraint:
    """`cpu_s`: what its next mask takes. `mask_s`: what the last one took."""

    def __init__(self, name: str, *, mask_s: float = 0.0, cpu_s: float = 0.0, may_end: bool = True) -> None:
        self.name, self.mask_s, self.cpu_s, self.is_suspect = name, mask_s, cpu_s, False
        self.pending_mask: Future[np.ndarray] | None = None
        self.spent_s = 0.0
        self.may_end = threading.Event()
        if may_end:
            self.may_end.set()

    def spend(self, cpu_s: float) -> None:
        self.spent_s += cpu_s


class FakeCompute:
    """A mask is there once its constraint's `may_end` is set. The CPU time that it says it took is the constraint's `cpu_s`."""

    def __init__(self) -> None:
        self.order: list[str] = []

    def together(self, constraints: Sequence[FakeConstraint]) -> tuple[list[np.ndarray], float]:
        return [self.alone(constraint)[0] for constraint in constraints], sum(c.cpu_s for c in constraints)

    def alone(self, constraint: FakeConstraint) -> tuple[np.ndarray, float]:
        assert constraint.may_end.wait(20)
        self.order.append(constraint.name)
        return MASK, constraint.cpu_s


def make() -> tuple[FakeCompute, MaskLanes[FakeConstraint]]:
    compute = FakeCompute()
    return compute, MaskLanes(compute, num_together=4, num_slow_threads=1)


def wait_for(*constraints: FakeConstraint) -> None:
    for constraint in constraints:
        assert constraint.pending_mask is not None
        constraint.pending_mask.result(20)


def test_a_step_does_not_wait_for_a_mask_that_takes_long(monkeypatch) -> None:
    compute, lanes = make()
    monkeypatch.setattr(masks_module, "MIN_WAIT_S", 0.05)
    quick = [FakeConstraint(f"quick {i}") for i in range(4)]
    slow = FakeConstraint("slow", mask_s=SLOW_MASK_S / 2, may_end=False)
    first = lanes.begin({"slow": slow, **{c.name: c for c in quick}})
    wait_for(*quick)
    found, late = first.take()
    assert (set(found), late) == ({c.name for c in quick}, {"slow"}), (
        "the quickest came first, though it was named last"
    )
    assert is_held(slow)
    # Its mask arrives in a later step, which does not compute it again.
    slow.may_end.set()
    lanes.wait_for_any([slow], 20)
    assert not is_held(slow)
    found, late = lanes.begin({"slow": slow}).take()
    assert (set(found), late) == ({"slow"}, set())
    assert compute.order.count("slow") == 1
    lanes.close()


def test_a_step_waits_a_part_of_its_forward_pass(monkeypatch) -> None:
    """At most: max(MIN_WAIT_S, WAIT_SHARE * forward pass). The fake clock says how long the forward pass took."""
    now, waited = [0.0], []

    def fake_wait(futures, timeout_s):
        waited.append(timeout_s)
        return set(), set(futures)

    monkeypatch.setattr(masks_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(masks_module, "wait", fake_wait)
    _, lanes = make()
    slow = FakeConstraint("slow", may_end=False)
    for forward_s, expected in ((0.001, 0.005), (0.02, 0.005), (0.4, 0.1)):
        step = lanes.begin({"slow": slow})
        now[0] += forward_s
        assert step.take() == ({}, {"slow"})
        assert abs(waited.pop() - expected) < 1e-9, f"after a forward pass of {forward_s} s"
    slow.may_end.set()
    lanes.close()


def test_a_slow_constraints_next_mask_is_computed_apart_and_counted() -> None:
    _, lanes = make()
    slow = FakeConstraint("slow", mask_s=2 * SLOW_MASK_S, cpu_s=3 * SLOW_MASK_S, may_end=False)
    quick = FakeConstraint("quick", mask_s=SLOW_MASK_S / 2)
    lanes.prepare(slow)
    lanes.prepare(quick)
    assert is_held(slow)
    assert quick.pending_mask is None, "it is computed next to the next forward pass"
    lanes.begin({"quick": quick}).take()
    slow.may_end.set()
    lanes.wait_for_any([slow], 20)
    assert (slow.spent_s, slow.mask_s) == (slow.cpu_s, slow.cpu_s)
    assert quick.spent_s == 0.0
    lanes.close()


def test_one_slow_mask_among_others_is_found_out() -> None:
    """Computed together, only their sum is known: each is computed alone once."""
    _, lanes = make()
    guilty, innocent = FakeConstraint("guilty", cpu_s=0.02), FakeConstraint("innocent", cpu_s=0.0001)
    lanes.begin({c.name: c for c in (guilty, innocent)})
    wait_for(guilty, innocent)
    assert is_slow(guilty)
    assert is_slow(innocent), "which of them took long is not known yet"
    for constraint in (guilty, innocent):
        constraint.pending_mask = None
        lanes.prepare(constraint)
    lanes.wait_for_any([guilty, innocent], 20)
    wait_for(guilty, innocent)
    assert is_slow(guilty)
    assert not is_slow(innocent)
    lanes.close()


def test_usual_masks_are_not_slow_in_company() -> None:
    _, lanes = make()
    usual = [FakeConstraint(str(i), cpu_s=0.0003) for i in range(4)]
    lanes.begin({c.name: c for c in usual})
    wait_for(*usual)
    assert not any(map(is_slow, usual))
    lanes.close()


def test_slow_constraints_take_turns_the_quickest_first() -> None:
    compute, lanes = make()
    first = FakeConstraint("first", mask_s=0.02, may_end=False)
    others = [FakeConstraint(name, mask_s=s) for name, s in (("a", 1.0), ("b", 1.0), ("quick", 0.002), ("c", 1.0))]
    for constraint in (first, *others):
        lanes.prepare(constraint)
    first.may_end.set()
    wait_for(*others)
    assert compute.order == ["first", "quick", "a", "b", "c"]
    lanes.close()


def test_a_thread_rests_after_a_slow_mask_unless_the_engine_waits() -> None:
    compute, lanes = make()
    slow = [FakeConstraint(str(i), mask_s=1.0, cpu_s=60.0, may_end=i != 1) for i in range(3)]
    for constraint in slow:
        lanes.prepare(constraint)
    wait_for(slow[0])
    assert compute.order == ["0"], "for a minute of rest"
    lanes.wait_for_any([slow[0]], 20)
    slow[1].may_end.set()
    wait_for(slow[1])
    assert compute.order == ["0", "1"], "the engine waits no longer"
    lanes.close()


def test_the_mask_of_a_request_that_ended_is_not_computed() -> None:
    compute, lanes = make()
    running, gone, last = (
        FakeConstraint(name, mask_s=1.0, may_end=name != "running") for name in ("running", "gone", "last")
    )
    for constraint in (running, gone, last):
        lanes.prepare(constraint)
    assert gone.pending_mask is not None
    gone.pending_mask.cancel()
    running.may_end.set()
    wait_for(last)
    assert compute.order == ["running", "last"]
    lanes.close()
