"""Acts on preemption notices: drains the replicas of a preempted node, tells Ray about it, and logs the result.

Knows the supervisor, the node watcher and Ray's own list of draining nodes; decide.py decides what a notice leads to. One per controller.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

from cluster.controller.preemption.decide import head_notice, is_due, is_on, notices_from_ray, replicas_to_drain
from cluster.controller.preemption.watch import NodeWatcher
from cluster.controller.supervisor import Supervisor
from cluster.protocol.spec import ClusterSpec
from cluster.protocol.view import NodeNotice, ReplicaState
from cluster.ray_runtime.nodes import drain_node

log = logging.getLogger(__name__)


class PreemptionHandler:
    """`configure`, then `round` every second; a new notice is acted on at once.

    on_change: called when `notices` changes.
    """

    def __init__(
        self,
        supervisor: Supervisor,
        make_watcher: Callable[[Callable[[], None]], NodeWatcher],
        on_change: Callable[[], None],
    ) -> None:
        self._supervisor = supervisor
        self._watcher = make_watcher(self._on_notice)
        self._on_change = on_change
        self._drain_timeout_s = 0.0
        self._from_ray: dict[str, NodeNotice] = {}
        self._drained: dict[str, float] = {}  # node id -> when its last replica had ended
        self._told_ray: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def notices(self) -> tuple[NodeNotice, ...]:
        """From all sources; a cloud's notice takes precedence over Ray's for the same node."""
        by_node = {**self._from_ray, **{n.node_id: n for n in self._watcher.notices}}
        return tuple(replace(n, drained_at=self._drained.get(n.node_id)) for n in by_node.values())

    @property
    def num_notices_total(self) -> int:
        return self._watcher.num_notices_total

    def configure(self, spec: ClusterSpec) -> None:
        self._watcher.configure(spec.preemption_notices)
        self._drain_timeout_s = spec.drain_timeout_s

    def round(self, draining: Mapping[str, int], *, gateway_nodes: Collection[str]) -> None:
        """draining: node id -> deadline in Unix milliseconds, 0 if unknown, of the nodes that Ray drains."""
        records = [r for r in self._supervisor.records() if r.state is not ReplicaState.LOST]
        ours = {*gateway_nodes, *(rank.node_id for r in records for rank in r.ranks)}
        self._watcher.update(ours)
        # Ray's autoscaler returns nodes all day long; nodes without a replica or gateway of this deployment do not matter.
        relevant = {n: at for n, at in draining.items() if n in ours or n in self._from_ray}
        notices = notices_from_ray(relevant, records, unknown_s=self._drain_timeout_s, now=time.time())
        self._from_ray = {n.node_id: self._from_ray.get(n.node_id, n) for n in notices}
        self._act()

    async def close(self) -> None:
        """Ends every watcher."""
        await self._watcher.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _on_notice(self) -> None:
        self._act()
        self._on_change()

    def _act(self) -> None:
        """Does what the notices require and has not been done yet."""
        now, notices = time.time(), self.notices
        due = [n for n in notices if not n.is_head and is_due(n, now)]
        for notice in due:  # first, so that Ray places no replacement there
            self._tell_ray(notice)
        for replica in replicas_to_drain(notices, self._supervisor.records(), now):
            grace_s = replica.until - now
            self._supervisor.drain(replica.replica_id, grace_s=grace_s, reason=replica.reason, is_leaving=True)
        self._supervisor.is_ending = head_notice(notices, now) is not None
        for notice in due:
            self._note_drained(notice, now)

    def _tell_ray(self, notice: NodeNotice) -> None:
        if notice.source == "ray" or notice.node_id in self._told_ray:
            return
        self._told_ray.add(notice.node_id)
        telling = asyncio.to_thread(drain_node, notice.node_id, notice.cause, notice.deadline)
        task = asyncio.create_task(telling, name="tell-ray")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _note_drained(self, notice: NodeNotice, now: float) -> None:
        if notice.drained_at is not None or any(is_on(r, notice.node_id) for r in self._supervisor.records()):
            return
        self._drained[notice.node_id] = now
        log.warning(
            "Node %s was drained %.1f s after its notice, %.0f s before its deadline.",
            notice.node_ip, now - notice.seen_at, notice.deadline - now,
        )  # fmt: skip
        self._on_change()
