"""The class of a rank's Ray actor: a RankWorker that also knows its node, and publishes its counters in Ray's metrics.

Knows Ray and nothing else of the control plane; the work is all in `workers.rank.worker`.
"""

import time
from dataclasses import replace

import ray

from cluster.ray_runtime.metrics import publish_rank
from cluster.replicas.adapter_files import AdapterContent, bring
from workers.profile.recording import Recording
from workers.rank.reports import RankDescription, Started
from workers.rank.worker import RankWorker


class RankActor(RankWorker):
    def start(self, host: str = "127.0.0.1") -> Started | None:
        """As RankWorker.start."""
        started = super().start(host)
        publish_rank(self.replica_id, self.rank, self.stats)
        return started

    def location(self) -> str:
        """The node's address and, for a rank that looks for its GPU there, how many Ray was told of."""
        here = ray.get_runtime_context().get_node_id()
        node = next(node for node in ray.nodes() if node["NodeID"] == here)
        num_gpus = node["Resources"].get("GPU", 0)
        return f"{node['NodeManagerAddress']}, where Ray counts {num_gpus:g} GPU{'s' * (num_gpus != 1)},"

    def describe(self) -> RankDescription:
        """As RankWorker.describe, with everything that a controller needs to adopt this rank."""
        return replace(super().describe(), node_id=ray.get_runtime_context().get_node_id())

    def bring_adapter(self, content: AdapterContent) -> None:
        """As RankWorker.load_adapter, also on a node that does not have the adapter's folder."""
        bring(content, ray.get_runtime_context().get_node_id(), load=self.load_adapter, fetch=ray.get)

    # See `RankProfile`. Ray calls an actor's own methods only.

    def prepare_profile(self) -> None:
        self.profile.prepare()

    def record_steps(self, num_steps: int) -> None:
        self.profile.record(num_steps)

    def end_profile(self) -> None:
        self.profile.end()

    def recording(self, timeout_s: float, max_events: int) -> Recording | None:
        return self.profile.recording(timeout_s, max_events)

    def clock_ns(self) -> int:
        """This machine's Unix time in nanoseconds."""
        return time.time_ns()
