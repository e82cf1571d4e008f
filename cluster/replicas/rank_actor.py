"""The class of a rank's Ray actor: a ShardWorker that also knows which node it is on.

Knows Ray and nothing else of the control plane; the work is all in `workers.shard`.
"""

from typing import Any

import ray

from workers.shard import ShardWorker


class RankActor(ShardWorker):
    def describe(self) -> dict[str, Any]:
        """What a controller needs to adopt this rank."""
        return {**super().describe(), "node_id": ray.get_runtime_context().get_node_id()}
