"""The class of a rank's Ray actor: a ShardWorker that also knows which node it is on, and shows its counters in Ray's metrics.

Knows Ray and nothing else of the control plane; the work is all in `workers.rank.worker`.
"""

from typing import Any

import ray

from cluster.protocol.view import RankStats
from cluster.ray_runtime.metrics import publish_rank
from workers.rank.worker import ShardWorker, Started


class RankActor(ShardWorker):
    def start(self, host: str = "127.0.0.1") -> Started | None:
        """As ShardWorker.start."""
        started = super().start(host)
        publish_rank(self.replica_id, self.rank, lambda: RankStats(**self.stats()))  # type: ignore[arg-type]
        return started

    def has_ended(self, timeout_s: float) -> tuple[bool, str | None]:
        """Whether this rank has ended, waiting so long for it, and why. Bounded: a call holds a thread, also when the caller has died."""
        return self._ended.wait(timeout_s), self.failure

    def describe(self) -> dict[str, Any]:
        """What a controller needs to adopt this rank."""
        return {**super().describe(), "node_id": ray.get_runtime_context().get_node_id()}
