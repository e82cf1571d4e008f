"""Watches nodes for the preemption notices of clouds, with one poller per node.

The controller polls for the head node itself, because it runs there; so a cluster of one machine needs no extra process. Every other node
with ranks or a gateway gets a small actor. decide.py decides what a notice leads to.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.controller.preemption.notices import Notice
from cluster.controller.preemption.poll import NoticePoller, cloud_to_watch
from cluster.protocol.notice import Cloud, PreemptionNotices
from cluster.protocol.view import NodeNotice
from cluster.ray_runtime.nodes import node_addresses

log = logging.getLogger(__name__)

RETRY_S = 5.0
FORGET_AFTER_S = 60.0  # after the deadline of a node that is no longer watched


class NoticeActor:
    """Polls on one node. The controller owns it and calls it in a loop; it ends with the controller."""

    def __init__(self, option: PreemptionNotices, log_level: str) -> None:
        logging.basicConfig(format="%(levelname)s notices %(name)s: %(message)s")
        logging.getLogger("cluster").setLevel(log_level)
        cloud = cloud_to_watch(option)
        self._poller = None if cloud is None else NoticePoller(cloud, self._on_change)
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> bool:
        """Starts polling. Returns whether this node is in a cloud that gives notices."""
        if self._poller is not None and self._task is None:
            self._task = asyncio.create_task(self._poller.run())
        return self._poller is not None

    async def next(self, known: Notice | None) -> Notice | None:
        """The current notice, once it differs from `known`."""
        assert self._poller is not None, "the controller asks only after `start` returned True"
        while self._poller.notice == known:
            self._changed.clear()
            await self._changed.wait()
        return self._poller.notice

    def _on_change(self, notice: Notice | None) -> None:
        self._changed.set()


def start_notice_actor(node_id: str, option: PreemptionNotices, log_level: str) -> ActorHandle:
    """A NoticeActor on that node and on no other."""
    on_this_node = NodeAffinitySchedulingStrategy(node_id, soft=False)
    options = {"num_cpus": 0, "max_restarts": 0, "scheduling_strategy": on_this_node}
    return ray.remote(NoticeActor).options(**options).remote(option, log_level)


@dataclass
class _WatchedNode:
    """`task` is None once the node no longer matters. It is done if the node is in no known cloud."""

    task: asyncio.Task[None] | None = None
    node_ip: str = ""
    notice: NodeNotice | None = None

    def stop(self) -> None:
        if self.task is not None:
            self.task.cancel()
            self.task = None


class NodeWatcher:
    """`update` sets the nodes to watch, `notices` has their notices. All on one event loop, in a process connected to Ray.

    here: the id of the node this runs on. on_change: called when `notices` changes. find_cloud, start_actor: for tests without a cloud
    and without Ray.
    """

    def __init__(
        self,
        on_change: Callable[[], None],
        *,
        here: str,
        log_level: str = "WARNING",
        find_cloud: Callable[[PreemptionNotices], Cloud | None] = cloud_to_watch,
        start_actor: Callable[[str, PreemptionNotices, str], ActorHandle] = start_notice_actor,
    ) -> None:
        self.num_notices_total = 0
        self._option: PreemptionNotices = "off"
        self._on_change = on_change
        self._log_level = log_level
        self._here = here
        self._find_cloud = find_cloud
        self._start_actor = start_actor
        self._watched: dict[str, _WatchedNode] = {}

    @property
    def notices(self) -> tuple[NodeNotice, ...]:
        return tuple(w.notice for w in self._watched.values() if w.notice is not None)

    def configure(self, option: PreemptionNotices) -> None:
        """Sets which cloud's notices to expect. After a change, all nodes are watched again from the next `update` on."""
        if option != self._option:
            self._option = option
            for watched in self._watched.values():
                watched.stop()
                watched.notice = None

    def update(self, nodes: Collection[str]) -> None:
        """Replaces the set of nodes to watch; the node this runs on is always one of them."""
        nodes = {*nodes, self._here}
        now = time.time()
        for node_id, watched in list(self._watched.items()):
            if node_id not in nodes:
                watched.stop()
            if watched.task is None and (watched.notice is None or now > watched.notice.deadline + FORGET_AFTER_S):
                del self._watched[node_id]
        for node_id in nodes if self._option != "off" else ():
            watched = self._watched.setdefault(node_id, _WatchedNode())
            if watched.task is None:
                watched.task = asyncio.create_task(self._watch(node_id), name=f"notices-of-{node_id[:6]}")

    async def close(self) -> None:
        """Ends every poller."""
        tasks = [w.task for w in self._watched.values() if w.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _watch(self, node_id: str) -> None:
        while True:
            try:
                addresses = await asyncio.to_thread(node_addresses)
                self._watched[node_id].node_ip = addresses.get(node_id, node_id[:6])
                if node_id == self._here:
                    await self._watch_here()
                else:
                    await self._watch_elsewhere(node_id)
                return
            except RayError as e:  # most likely the node is gone; retry until Ray reports that
                log.info("Node %s cannot be watched for preemption notices now: %s", node_id[:6], type(e).__name__)
            except Exception as e:  # an unexpected error must not leave the node without a watcher
                log.exception("Watching node %s for preemption notices failed: %s", node_id[:6], e)
            await asyncio.sleep(RETRY_S)

    async def _watch_here(self) -> None:
        cloud = self._find_cloud(self._option)
        if cloud is not None:
            await NoticePoller(cloud, lambda notice: self._handle_notice(self._here, notice)).run()

    async def _watch_elsewhere(self, node_id: str) -> None:
        actor = self._start_actor(node_id, self._option, self._log_level)
        try:
            if not await actor.start.remote():
                return
            known: Notice | None = None
            while True:
                known = await actor.next.remote(known)
                self._handle_notice(node_id, known)
        finally:
            with contextlib.suppress(RayError, ValueError):
                ray.kill(actor)

    def _handle_notice(self, node_id: str, notice: Notice | None) -> None:
        watched = self._watched[node_id]
        before = watched.notice
        if notice is None:
            watched.notice = None
            if before is not None:
                log.warning("The preemption notice of node %s was withdrawn.", before.node_ip)
        elif before is not None:
            watched.notice = replace(before, cause=notice.message, deadline=notice.deadline)
        else:
            self.num_notices_total += 1
            watched.notice = NodeNotice(
                node_id=node_id,
                node_ip=watched.node_ip,
                is_head=node_id == self._here,
                source=notice.cloud,
                cause=notice.message,
                deadline=notice.deadline,
                seen_at=time.time(),
            )
            left_s = max(0.0, notice.deadline - time.time())
            log.warning("Node %s will be removed in %.0f s: %s", watched.notice.node_ip, left_s, notice.message)
        self._on_change()
