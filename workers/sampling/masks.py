"""When the masks of grammars are computed: next to the model's forward pass while that is quick, otherwise apart and over several steps.

A mask usually takes microseconds, and an ambiguous grammar's many milliseconds. A step waits for it a quarter of the time of the forward
pass. A constraint whose mask is not there by then is `held`: its request is not part of a step until the mask is there. Its next token
stays the same, because a token depends on logits, parameters, seed and position only. From then on its masks are computed in the
background, the quickest first, with a rest after each while other requests run. Knows constraints and threads; no requests, grammars or
logits.
"""

import itertools
import queue
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Generic, Protocol, TypeVar

import numpy as np

# Of CPU time. A mask that takes longer is computed apart from the steps. Usual masks take 0.01 ms, few of them up to 0.3 ms.
SLOW_MASK_S = 0.001
# Some masks that are computed together may take that long each before one of them counts as slow.
USUAL_MASK_S = 0.0001
# A mask waits for others that are quicker, but not for those that came later than so many times its own time.
PATIENCE = 100.0
# While other requests run, a thread rests after a slow mask for so many times the CPU time that it took.
REST = 1.0
# A step waits for masks a part of the time that the forward pass took, but at least so long.
WAIT_SHARE = 0.25
MIN_WAIT_S = 0.005


class Masked(Protocol):
    """What a mask is computed for. `mask_s`: CPU time of the last one, or the mean of those that were computed together. `is_suspect`:
    one of those was slow. `spend` counts CPU time against the budget of the request.
    """

    mask_s: float
    is_suspect: bool
    pending_mask: "Future[np.ndarray] | None"

    def spend(self, cpu_s: float) -> None: ...


MaskedT = TypeVar("MaskedT", bound=Masked, contravariant=True)


class ComputeMasks(Protocol[MaskedT]):
    """Computes masks, and says how much CPU time they took. Neither method raises: a constraint whose mask cannot be computed is in
    error, and its mask means nothing.
    """

    def together(self, constraints: Sequence[MaskedT]) -> tuple[Sequence[np.ndarray], float]:
        """May use several cores."""
        ...

    def alone(self, constraint: MaskedT) -> tuple[np.ndarray, float]:
        """In the background. May be called on as many threads at once as MaskLanes has for slow masks."""
        ...


class StepMasks:
    """The masks of one step, on their way."""

    def __init__(self, futures: "Mapping[str, Future[np.ndarray]]") -> None:
        self._futures = futures
        self._begun = time.monotonic()

    @property
    def are_there(self) -> bool:
        return all(future.done() for future in self._futures.values())

    def take(self) -> tuple[dict[str, np.ndarray], set[str]]:
        """The masks by request id, and the requests that must wait for theirs. Call it when the logits are there."""
        patience = max(MIN_WAIT_S, WAIT_SHARE * (time.monotonic() - self._begun))
        done, late = wait(self._futures.values(), patience)
        return (
            {name: future.result() for name, future in self._futures.items() if future in done},
            {name for name, future in self._futures.items() if future in late},
        )


class MaskLanes(Generic[MaskedT]):
    """`begin`, `prepare` and `wait_for_any` belong to the engine thread. No constraint may be touched while its mask is being computed: see
    `is_held`.
    """

    def __init__(self, compute: ComputeMasks[MaskedT], *, num_together: int, num_slow_threads: int) -> None:
        self._compute = compute
        self._num_together = num_together
        self._quick = ThreadPoolExecutor(1, "grammar-masks")
        self._slow = ThreadPoolExecutor(num_slow_threads, "slow-grammar-masks")
        # By the latest time at which it should begin.
        self._waiting: queue.PriorityQueue[tuple[float, int, MaskedT]] = queue.PriorityQueue()
        self._numbers = itertools.count()
        self._engine_waits = threading.Event()

    def begin(self, constraints: Mapping[str, MaskedT]) -> StepMasks:
        """Starts the masks that are not there or on their way yet, the quickest first."""
        missing = [constraint for constraint in constraints.values() if constraint.pending_mask is None]
        missing.sort(key=lambda constraint: constraint.mask_s)
        for constraint in missing:
            constraint.pending_mask = Future()
        for start in range(0, len(missing), self._num_together):
            self._quick.submit(self._compute_together, missing[start : start + self._num_together])
        return StepMasks({name: c.pending_mask for name, c in constraints.items() if c.pending_mask is not None})

    def prepare(self, constraint: MaskedT) -> None:
        """After a token: a slow constraint's next mask starts now. The request is held until it is there."""
        if is_slow(constraint) and constraint.pending_mask is None:
            constraint.pending_mask = Future()
            latest = time.monotonic() + PATIENCE * constraint.mask_s
            self._waiting.put((latest, next(self._numbers), constraint))
            self._slow.submit(self._compute_next_alone)

    def wait_for_any(self, constraints: Sequence[Masked], timeout_s: float) -> None:
        """Returns when one of them is no longer held. Nothing else runs in the meantime, so slow masks need no rests."""
        self._engine_waits.set()
        wait([c.pending_mask for c in constraints if c.pending_mask is not None], timeout_s, FIRST_COMPLETED)
        self._engine_waits.clear()

    def close(self) -> None:
        self._engine_waits.set()
        self._quick.shutdown(wait=False, cancel_futures=True)
        self._slow.shutdown(wait=False, cancel_futures=True)

    def _compute_together(self, started: Sequence[MaskedT]) -> None:
        constraints = [constraint for constraint in started if _is_wanted(constraint)]
        if not constraints:
            return
        masks, cpu_s = self._compute.together(constraints)
        # Which of them was slow is not known. Each is computed alone once, which finds out.
        one_was_slow = cpu_s > SLOW_MASK_S + USUAL_MASK_S * len(constraints)
        for constraint, mask in zip(constraints, masks, strict=True):
            constraint.mask_s, constraint.is_suspect = cpu_s / len(constraints), one_was_slow
            _deliver(constraint, mask)

    def _compute_next_alone(self) -> None:
        _, _, constraint = self._waiting.get_nowait()
        if not _is_wanted(constraint):
            return
        mask, cpu_s = self._compute.alone(constraint)
        constraint.mask_s, constraint.is_suspect = cpu_s, False
        constraint.spend(cpu_s)
        _deliver(constraint, mask)
        self._engine_waits.wait(REST * cpu_s)


def is_held(constraint: Masked) -> bool:
    """Whether the constraint's mask is being computed, so that its request must not be part of a step."""
    return constraint.pending_mask is not None and not constraint.pending_mask.done()


def is_slow(constraint: Masked) -> bool:
    """Whether the constraint's masks are computed apart from the steps."""
    return constraint.mask_s > SLOW_MASK_S or constraint.is_suspect


def _is_wanted(constraint: Masked) -> bool:
    """False if its request has ended, and canceled its mask."""
    return constraint.pending_mask is not None and constraint.pending_mask.set_running_or_notify_cancel()


def _deliver(constraint: Masked, mask: np.ndarray) -> None:
    if constraint.pending_mask is not None:
        constraint.pending_mask.set_result(mask)
