"""Learns of nodes that will be taken away: from the clouds' notices, one watcher a node, and from Ray, which drains nodes of its own.

The head node is watched by the controller itself, which runs there, so a cluster of one machine costs no further process; every other
node that holds ranks or a gateway gets a small actor. What a notice leads to is decided elsewhere (leaving.py).
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
from cluster.controller.preemption.poll import NoticeWatcher, cloud_to_watch
from cluster.protocol.notice import PreemptionNotices
from cluster.protocol.view import NodeNotice
from cluster.ray_runtime.nodes import node_addresses

log = logging.getLogger(__name__)

RETRY_S = 5.0
FORGET_AFTER_S = 60.0  # behind the deadline of a node that nobody watches any more


class NoticeActor:
    """One node's watcher. Asked again and again by the controller that owns it, with which it ends."""

    def __init__(self, asked: PreemptionNotices, log_level: str) -> None:
        logging.basicConfig(format="%(levelname)s notices %(name)s: %(message)s")
        logging.getLogger("cluster").setLevel(log_level)
        cloud = cloud_to_watch(asked)
        self._watcher = None if cloud is None else NoticeWatcher(cloud, self._take)
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def watches(self) -> bool:
        """Whether this node is in a cloud that gives notices; begins to watch."""
        if self._watcher is not None and self._task is None:
            self._task = asyncio.create_task(self._watcher.run())
        return self._watcher is not None

    async def next(self, known: Notice | None) -> Notice | None:
        """What there is, once it differs from `known`."""
        assert self._watcher is not None, "only a node that is watched is asked"
        while self._watcher.notice == known:
            self._changed.clear()
            await self._changed.wait()
        return self._watcher.notice

    def _take(self, notice: Notice | None) -> None:
        self._changed.set()


@dataclass
class _Watched:
    """`task` is None once the node does not matter any more, and is done when it is in no cloud."""

    task: asyncio.Task[None] | None = None
    node_ip: str = ""
    notice: NodeNotice | None = None

    def stop(self) -> None:
        if self.task is not None:
            self.task.cancel()
            self.task = None


class NodeWatch:
    """`update` says which nodes matter, `notices` what is known of them. All on one event loop, in a process connected to Ray.

    here: the node this runs on. on_change: called when `notices` says something new.
    """

    def __init__(self, on_change: Callable[[], None], *, here: str, log_level: str = "WARNING") -> None:
        self.num_notices_total = 0
        self._asked: PreemptionNotices = "off"
        self._on_change = on_change
        self._log_level = log_level
        self._here = here
        self._watched: dict[str, _Watched] = {}

    @property
    def notices(self) -> tuple[NodeNotice, ...]:
        return tuple(w.notice for w in self._watched.values() if w.notice is not None)

    def configure(self, asked: PreemptionNotices) -> None:
        """Whose notices to expect. What is watched otherwise is watched anew, from the next `update` on."""
        if asked != self._asked:
            self._asked = asked
            for watched in self._watched.values():
                watched.stop()
                watched.notice = None

    def update(self, nodes: Collection[str]) -> None:
        """From now on these nodes matter, and the one this runs on."""
        nodes = {*nodes, self._here}
        now = time.time()
        for node_id, watched in list(self._watched.items()):
            if node_id not in nodes:
                watched.stop()
            if watched.task is None and (watched.notice is None or now > watched.notice.deadline + FORGET_AFTER_S):
                del self._watched[node_id]
        for node_id in nodes if self._asked != "off" else ():
            watched = self._watched.setdefault(node_id, _Watched())
            if watched.task is None:
                watched.task = asyncio.create_task(self._watch(node_id), name=f"notices-of-{node_id[:6]}")

    async def close(self) -> None:
        """Ends every watcher."""
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
            except RayError as e:  # its node is gone, most likely; until that is known it is tried again
                log.info("The node %s cannot be watched for notices now: %s", node_id[:6], type(e).__name__)
            except Exception as e:  # one node's surprise must not leave it without a watcher
                log.exception("Watching the node %s for notices failed: %s", node_id[:6], e)
            await asyncio.sleep(RETRY_S)

    async def _watch_here(self) -> None:
        cloud = cloud_to_watch(self._asked)
        if cloud is not None:
            await NoticeWatcher(cloud, lambda notice: self._take(self._here, notice)).run()

    async def _watch_elsewhere(self, node_id: str) -> None:
        actor = self._start_actor(node_id)
        try:
            if not await actor.watches.remote():
                return
            known: Notice | None = None
            while True:
                known = await actor.next.remote(known)
                self._take(node_id, known)
        finally:
            with contextlib.suppress(RayError, ValueError):
                ray.kill(actor)

    def _start_actor(self, node_id: str) -> ActorHandle:
        here_and_nowhere_else = NodeAffinitySchedulingStrategy(node_id, soft=False)
        options = {"num_cpus": 0, "max_restarts": 0, "scheduling_strategy": here_and_nowhere_else}
        return ray.remote(NoticeActor).options(**options).remote(self._asked, self._log_level)

    def _take(self, node_id: str, notice: Notice | None) -> None:
        watched = self._watched[node_id]
        before = watched.notice
        if notice is None:
            watched.notice = None
            if before is not None:
                log.warning("The node %s stays: the notice was withdrawn.", before.node_ip)
        elif before is not None:
            watched.notice = replace(before, cause=notice.sentence, deadline=notice.deadline)
        else:
            self.num_notices_total += 1
            watched.notice = NodeNotice(
                node_id=node_id,
                node_ip=watched.node_ip,
                is_head=node_id == self._here,
                source=notice.cloud,
                cause=notice.sentence,
                deadline=notice.deadline,
                seen_at=time.time(),
            )
            left_s = max(0.0, notice.deadline - time.time())
            log.warning("The node %s goes away in %.0f s: %s", watched.notice.node_ip, left_s, notice.sentence)
        self._on_change()
