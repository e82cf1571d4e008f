"""Acts on notices: drains the replicas of a node that goes away, tells Ray of it, and says in the log how it went.

Knows the supervisor, the watch and Ray's own list of draining nodes; what a notice leads to is decided in leaving.py. One per controller.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

from cluster.controller.preemption.decide import ending, from_ray, is_due, is_on, leaving_replicas
from cluster.controller.preemption.watch import NodeWatch
from cluster.controller.supervisor import Supervisor
from cluster.protocol.spec import ClusterSpec
from cluster.protocol.view import NodeNotice, ReplicaState
from cluster.ray_runtime.nodes import drain_node

log = logging.getLogger(__name__)


class Evacuation:
    """`configure`, then `round` every second; news of a watcher is acted on at once.

    on_change: called when `notices` says something new.
    """

    def __init__(
        self,
        supervisor: Supervisor,
        make_watch: Callable[[Callable[[], None]], NodeWatch],
        on_change: Callable[[], None],
    ) -> None:
        self._supervisor = supervisor
        self._watch = make_watch(self._on_notice)
        self._on_change = on_change
        self._drain_timeout_s = 0.0
        self._from_ray: dict[str, NodeNotice] = {}
        self._drained: dict[str, float] = {}  # node id -> when its last replica was gone
        self._told_ray: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def notices(self) -> tuple[NodeNotice, ...]:
        """Of all sources; a cloud's own goes before what Ray says of the same node."""
        by_node = {**self._from_ray, **{n.node_id: n for n in self._watch.notices}}
        return tuple(replace(n, drained_at=self._drained.get(n.node_id)) for n in by_node.values())

    @property
    def num_notices_total(self) -> int:
        return self._watch.num_notices_total

    def configure(self, spec: ClusterSpec) -> None:
        self._watch.configure(spec.preemption_notices)
        self._drain_timeout_s = spec.drain_timeout_s

    def round(self, draining: Mapping[str, int], *, gateway_nodes: Collection[str]) -> None:
        """draining: the nodes of which Ray itself says that they go."""
        records = [r for r in self._supervisor.records() if r.state is not ReplicaState.LOST]
        ours = {*gateway_nodes, *(rank.node_id for r in records for rank in r.ranks)}
        self._watch.update(ours)
        # Ray's autoscaler gives nodes back all day long; those without anything of ours are nobody's business here.
        said = {n: at for n, at in draining.items() if n in ours or n in self._from_ray}
        notices = from_ray(said, records, unknown_s=self._drain_timeout_s, now=time.time())
        self._from_ray = {n.node_id: self._from_ray.get(n.node_id, n) for n in notices}
        self._act()

    async def close(self) -> None:
        """Ends every watcher."""
        await self._watch.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _on_notice(self) -> None:
        self._act()
        self._on_change()

    def _act(self) -> None:
        """Does what the notices ask for and is not done yet."""
        now, notices = time.time(), self.notices
        going = [n for n in notices if not n.is_head and is_due(n, now)]
        for notice in going:  # first: a successor that is placed there meanwhile has to be started once more
            self._tell_ray(notice)
        for replica in leaving_replicas(notices, self._supervisor.records(), now):
            grace_s = replica.until - now
            self._supervisor.drain(replica.replica_id, grace_s=grace_s, reason=replica.reason, is_leaving=True)
        self._supervisor.is_ending = ending(notices, now) is not None
        for notice in going:
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
            "The node %s is drained %.1f s after the notice, %.0f s before its end.",
            notice.node_ip, now - notice.seen_at, notice.deadline - now,
        )  # fmt: skip
        self._on_change()
