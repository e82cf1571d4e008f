"""When masks are computed: a slow one holds its own request only, and uses up its request's budget. The only clock is a fake's."""

import threading
from collections.abc import Sequence
from concurrent.futures import Future

import numpy as np

from workers.sampling import masks as masks_module
from workers.sampling.masks import SLOW_MASK_S, MaskLanes, is_held

MASK = np.ones(1, dtype=np.uint8)


class FakeConstraint:
    def __init__(self, name: str, *, mask_s: float = 0.0) -> None:
        self.name, self.mask_s, self.mask_s_is_exact = name, mask_s, True
        self.pending_mask: Future[np.ndarray] | None = None
        self.spent_s = 0.0
        self.may_end = threading.Event()
        self.may_end.set()

    def spend(self, cpu_s: float) -> None:
        self.spent_s += cpu_s


class FakeCompute:
    """Each mask takes until its constraint's `may_end` is set, and a second of the fake clock when it is computed alone."""

    def __init__(self) -> None:
        self.now = 0.0
        self.order: list[str] = []

    def cpu_time(self) -> float:
        return self.now

    def together(self, constraints: Sequence[FakeConstraint]) -> list[np.ndarray]:
        for constraint in constraints:
            assert constraint.may_end.wait(20)
            self.order.append(constraint.name)
        return [MASK] * len(constraints)

    def alone(self, constraint: FakeConstraint) -> np.ndarray:
        assert constraint.may_end.wait(20)
        self.order.append(constraint.name)
        self.now += 1.0
        return MASK


def make() -> tuple[FakeCompute, MaskLanes[FakeConstraint]]:
    compute = FakeCompute()
    return compute, MaskLanes(compute, num_cpus=1, cpu_time=compute.cpu_time)


def test_a_step_does_not_wait_for_a_mask_that_takes_long(monkeypatch) -> None:
    compute, lanes = make()
    monkeypatch.setattr(masks_module, "MIN_WAIT_S", 0.05)
    quick = [FakeConstraint(f"quick {i}") for i in range(4)]
    slow = FakeConstraint("slow", mask_s=SLOW_MASK_S / 2)
    slow.may_end.clear()
    first = lanes.begin({"slow": slow, **{c.name: c for c in quick}})
    for constraint in quick:
        assert constraint.pending_mask is not None
        constraint.pending_mask.result(20)
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


def test_a_slow_constraints_next_mask_is_computed_apart_and_counted() -> None:
    _, lanes = make()
    slow, quick = FakeConstraint("slow", mask_s=2 * SLOW_MASK_S), FakeConstraint("quick", mask_s=SLOW_MASK_S / 2)
    slow.may_end.clear()
    lanes.prepare(slow)
    lanes.prepare(quick)
    assert is_held(slow)
    assert quick.pending_mask is None, "it is computed next to the next forward pass"
    lanes.begin({"quick": quick}).take()
    slow.may_end.set()
    lanes.wait_for_any([slow], 20)
    assert (slow.spent_s, slow.mask_s) == (1.0, 1.0)
    assert quick.spent_s == 0.0
    lanes.close()


def test_slow_constraints_take_turns() -> None:
    compute, lanes = make()
    slow = [FakeConstraint(str(i), mask_s=1.0) for i in range(3)]
    for constraint in slow:
        constraint.may_end.clear()
        lanes.prepare(constraint)
    for constraint in slow:
        constraint.may_end.set()
    for constraint in slow:
        assert constraint.pending_mask is not None
        constraint.pending_mask.result(20)
    assert compute.order == ["0", "1", "2"]
    lanes.close()
