"""When the masks of grammars are computed: next to the model's forward pass while that is quick, otherwise apart and over several steps.

A mask usually takes microseconds, and an ambiguous grammar's many milliseconds. A step waits for it a quarter of the time of the forward
pass. A constraint whose mask is not there by then is `held`: its request is not part of a step until the mask is there. Its next token
stays the same, because a token depends on logits, parameters, seed and position only. From then on its masks are computed on threads of
low priority, in turns with other slow ones, until one is quick again. Knows constraints and threads; no requests, grammars or logits.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Generic, Protocol, TypeVar

import numpy as np

# Slower than that, a mask is computed apart from the steps.
SLOW_MASK_S = 0.005
# A step waits for masks a part of the time that the forward pass took, but at least so long.
WAIT_SHARE = 0.25
MIN_WAIT_S = 0.005


class Masked(Protocol):
    """What a mask is computed for. `mask_s`: how long the last one took; `spend` counts CPU time against the budget of the request."""

    mask_s: float
    mask_s_is_exact: bool
    pending_mask: "Future[np.ndarray] | None"

    def spend(self, cpu_s: float) -> None: ...


MaskedT = TypeVar("MaskedT", bound=Masked, contravariant=True)


class ComputeMasks(Protocol[MaskedT]):
    """Computes masks. Neither method raises: a constraint whose mask cannot be computed is in error, and its mask means nothing."""

    def together(self, constraints: Sequence[MaskedT]) -> Sequence[np.ndarray]:
        """May use several cores."""
        ...

    def alone(self, constraint: MaskedT) -> np.ndarray:
        """On the calling thread."""
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
    """`begin` and `prepare` belong to the engine thread. No constraint may be touched while its mask is being computed: see `is_held`."""

    def __init__(
        self, compute: ComputeMasks[MaskedT], *, num_cpus: int, cpu_time: Callable[[], float] = time.thread_time
    ) -> None:
        self._compute = compute
        self._cpu_time = cpu_time
        self._num_cpus = num_cpus
        self._at_once = 4 * num_cpus
        self._quick = ThreadPoolExecutor(1, "grammar-masks")
        # Finds out which of some constraints is slow.
        self._apart = ThreadPoolExecutor(1, "grammar-masks-apart")
        self._slow = ThreadPoolExecutor(max(1, num_cpus // 4), "slow-grammar-masks", initializer=_lower_priority)

    def begin(self, constraints: Mapping[str, MaskedT]) -> StepMasks:
        """Starts the masks that are not there or on their way yet, the quickest first."""
        missing = [constraint for constraint in constraints.values() if constraint.pending_mask is None]
        missing.sort(key=lambda constraint: constraint.mask_s)
        for constraint in missing:
            constraint.pending_mask = Future()
        for start in range(0, len(missing), self._at_once):
            self._quick.submit(self._compute_together, missing[start : start + self._at_once])
        return StepMasks({name: c.pending_mask for name, c in constraints.items() if c.pending_mask is not None})

    def prepare(self, constraint: MaskedT) -> None:
        """After a token: a slow constraint's next mask starts now. The request is held until it is there."""
        if constraint.mask_s > SLOW_MASK_S and constraint.pending_mask is None:
            constraint.pending_mask = Future()
            lane = self._slow if constraint.mask_s_is_exact else self._apart
            lane.submit(self._compute_apart, constraint)

    def wait_for_any(self, constraints: Sequence[Masked], timeout_s: float) -> None:
        """Returns when one of them is no longer held."""
        wait([c.pending_mask for c in constraints if c.pending_mask is not None], timeout_s, FIRST_COMPLETED)

    def close(self) -> None:
        self._quick.shutdown(wait=False, cancel_futures=True)
        self._apart.shutdown(wait=False, cancel_futures=True)
        self._slow.shutdown(wait=False, cancel_futures=True)

    def _compute_together(self, constraints: Sequence[MaskedT]) -> None:
        begun = time.perf_counter()
        masks = self._compute.together(constraints)
        took_s = time.perf_counter() - begun
        # Which of them was slow is not known. All are computed apart once, which finds out.
        one_was_slow = took_s > SLOW_MASK_S * (1 + len(constraints) / self._num_cpus)
        for constraint, mask in zip(constraints, masks, strict=True):
            constraint.mask_s = took_s if one_was_slow else took_s / len(constraints)
            constraint.mask_s_is_exact = False
            _deliver(constraint, mask)

    def _compute_apart(self, constraint: MaskedT) -> None:
        # A thread of low priority often waits for a core, so CPU time says what a mask costs.
        begun = self._cpu_time()
        mask = self._compute.alone(constraint)
        constraint.mask_s, constraint.mask_s_is_exact = self._cpu_time() - begun, True
        constraint.spend(constraint.mask_s)
        _deliver(constraint, mask)


def is_held(constraint: Masked) -> bool:
    """Whether the constraint's mask is being computed, so that its request must not be part of a step."""
    return constraint.pending_mask is not None and not constraint.pending_mask.done()


def _deliver(constraint: Masked, mask: np.ndarray) -> None:
    if constraint.pending_mask is not None:
        constraint.pending_mask.set_result(mask)


def _lower_priority() -> None:
    """The calling thread gets a quarter of a core that another thread wants too. On Linux; elsewhere nothing changes."""
    with contextlib.suppress(OSError, AttributeError):
        thread_id = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread_id, min(19, os.getpriority(os.PRIO_PROCESS, thread_id) + 5))
