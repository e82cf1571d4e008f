"""What a gateway does when its own machine goes away: it says so, later takes nothing new, at last ends what still runs, in order.

Streams move from replica to replica, but a client's connection ends with its gateway. Knows views, notices and the router; no HTTP server
and no replicas. Where the machine stays after all, so does the gateway.
"""

import asyncio
import enum
import logging
import time
from collections.abc import Callable

from cluster.api.server.errors import Refusal
from cluster.controller.preemption.decide import is_due
from cluster.protocol.view import ClusterView, NodeNotice
from cluster.router.router import Router

log = logging.getLogger(__name__)

LOOK_EVERY_S = 0.25
# Until then requests are served, though load balancers are told to send none: most are over sooner, and there may be no other server.
CLOSES_AHEAD_S = 15.0
# A connection that simply breaks would tell its client nothing.
ENDS_AHEAD_S = 3.0


class Stage(enum.IntEnum):
    STAYS = 0
    LEAVES = 1  # not ready for load balancers; serves
    CLOSED = 2  # new requests are refused
    ENDED = 3  # what still ran has been ended


def stage_of(notice: NodeNotice | None, now: float) -> Stage:
    if notice is None:
        return Stage.STAYS
    left_s = notice.deadline - now
    return Stage.LEAVES if left_s > CLOSES_AHEAD_S else Stage.CLOSED if left_s > ENDS_AHEAD_S else Stage.ENDED


def notice_for(view: ClusterView, gateway_id: str, now: float) -> NodeNotice | None:
    """The one that ends this gateway first, once it is due: of its own node, or of the head node, which takes all of Ray along."""
    node_id = next((g.node_id for g in view.gateways if g.gateway_id == gateway_id), None)
    notices = [n for n in view.notices if (n.is_head or n.node_id == node_id) and is_due(n, now)]
    return min(notices, key=lambda n: n.deadline, default=None)


class Departure:
    """`await run()` in a task until cancelled. view: the newest one."""

    def __init__(
        self,
        router: Router,
        view: Callable[[], ClusterView | None],
        gateway_id: str,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._router = router
        self._view = view
        self._gateway_id = gateway_id
        self._clock = clock
        self._stage = Stage.STAYS
        self._stopped = False

    def stop(self) -> None:
        """For a gateway that ends anyway."""
        self._stopped = True

    async def run(self) -> None:
        while True:
            self.look()
            await asyncio.sleep(LOOK_EVERY_S)

    def look(self) -> None:
        """Does what the newest view asks for."""
        if self._stopped:
            return
        now, view = self._clock(), self._view()
        notice = None if view is None else notice_for(view, self._gateway_id, now)
        stage = stage_of(notice, now)
        if stage is self._stage:
            return
        before, self._stage = self._stage, stage
        if notice is None:
            log.warning("The machine of this gateway stays after all; requests are welcome again.")
            self._router.reopen()
            return
        reason = _reason(notice)
        if before is Stage.STAYS:
            log.warning("%s Load balancers are told to send nothing more; streams have until then.", reason)
        self._router.close(reason, admits=stage is Stage.LEAVES)
        if stage is Stage.ENDED:
            num_ended = self._router.end_streams(ended(reason))
            log.warning("%s %d requests that still ran were ended.", reason, num_ended)


def ended(reason: str) -> Refusal:
    """What the client of an unfinished request is told."""
    message = (
        f"{reason} This request was not complete in time; send it again, to another server or to this one's successor."
    )
    return Refusal(503, message, code="server_leaving", headers={"Retry-After": "5"})


def _reason(notice: NodeNotice) -> str:
    at = time.strftime("%H:%M:%S UTC", time.gmtime(notice.deadline))
    return f"This server goes away at {at}: {notice.cause}"
