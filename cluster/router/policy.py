"""Which replica takes a request: pure functions of what is known about the replicas.

Knows numbers only; the clock and the replicas stay in router.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Candidate:
    """A ready replica. `num_own_requests` are those this gateway has there; the report's counts lag behind by a step."""

    index: int
    num_own_requests: int
    num_reported_requests: int
    kv_cache_usage: float  # 0 to 1


def choose(candidates: Sequence[Candidate]) -> Candidate | None:
    """The least loaded: fewest requests, then least KV in use, then the first. None when there is no candidate."""
    return min(
        candidates,
        key=lambda c: (max(c.num_own_requests, c.num_reported_requests), c.kv_cache_usage, c.index),
        default=None,
    )
