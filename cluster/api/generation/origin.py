"""Where a request comes from, as far as that changes what becomes of it: over HTTP, or as a line of a batch.

Knows priorities, seeds and the patience with crashes that follow. Knows no endpoint.
"""

from dataclasses import dataclass

from cluster.api.generation import sampling
from cluster.api.server import limits
from workers.protocol import BATCH_PRIORITY


@dataclass(frozen=True, kw_only=True)
class Origin:
    """`seed`: for a body that brings none; None: a random one. `is_line`: of a batch, which runs behind everything that is none.

    `max_crashes`: of replicas that work on it, before it is given up; None: the router's own number.
    """

    seed: int | None = None
    is_line: bool = False
    max_crashes: int | None = None

    def seed_of(self, asked: int | None) -> int:
        if asked is not None:
            return asked
        return sampling.random_seed() if self.seed is None else self.seed

    def priority_of(self, asked: int | None) -> int:
        """As far as the request's key may have it."""
        allowed = limits.priority(asked)
        return BATCH_PRIORITY + max(allowed, 0) if self.is_line else allowed


HTTP = Origin()
