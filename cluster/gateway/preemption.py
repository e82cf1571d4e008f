"""Shuts a gateway down in stages before its own node is preempted: not ready for load balancers, then closed, then ended.

Streams move from replica to replica, but a client's connection ends with its gateway. Knows views, notices and the router; no HTTP server
and no replicas. If the notice is withdrawn, the gateway is open again.
"""

import asyncio
import enum
import logging
import time
from collections.abc import Callable
from typing import Protocol

from cluster.api.server.errors import HTTPError
from cluster.controller.preemption.decide import is_due
from cluster.protocol.view import ClusterView, NodeNotice

log = logging.getLogger(__name__)

POLL_INTERVAL_S = 0.25
# Until this long before the deadline requests are served, though load balancers are told to send none: most finish sooner, and there may
# be no other server.
CLOSES_AHEAD_S = 15.0
# This long before it running requests are ended with an error: a broken connection would tell its client nothing.
ENDS_AHEAD_S = 3.0


class Stage(enum.IntEnum):
    OPEN = 0
    NOT_READY = 1  # for load balancers; still serves
    CLOSED = 2  # new requests are refused
    ENDED = 3  # running requests have been ended


def stage_of(notice: NodeNotice | None, now: float) -> Stage:
    if notice is None:
        return Stage.OPEN
    left_s = notice.deadline - now
    return Stage.NOT_READY if left_s > CLOSES_AHEAD_S else Stage.CLOSED if left_s > ENDS_AHEAD_S else Stage.ENDED


def notice_for(view: ClusterView, gateway_id: str, now: float) -> NodeNotice | None:
    """The due notice that ends this gateway first: of its own node, or of the head node, because all of Ray ends with that."""
    node_id = next((g.node_id for g in view.gateways if g.gateway_id == gateway_id), None)
    notices = [n for n in view.notices if (n.is_head or n.node_id == node_id) and is_due(n, now)]
    return min(notices, key=lambda n: n.deadline, default=None)


class Closable(Protocol):
    """A router, or all of a gateway's; see Router."""

    def close(self, reason: str, *, admits: bool = False) -> None: ...
    def reopen(self) -> None: ...
    def end_streams(self, error: Exception) -> int: ...


class PreemptionShutdown:
    """`await run()` in a task until cancelled. view: returns the newest view."""

    def __init__(
        self,
        router: Closable,
        view: Callable[[], ClusterView | None],
        gateway_id: str,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._router = router
        self._view = view
        self._gateway_id = gateway_id
        self._clock = clock
        self._stage = Stage.OPEN
        self._stopped = False

    def stop(self) -> None:
        """Does nothing more: the gateway shuts down for another reason."""
        self._stopped = True

    async def run(self) -> None:
        while True:
            self.poll()
            await asyncio.sleep(POLL_INTERVAL_S)

    def poll(self) -> None:
        """Enters the stage that the newest view requires."""
        if self._stopped:
            return
        now, view = self._clock(), self._view()
        notice = None if view is None else notice_for(view, self._gateway_id, now)
        stage = stage_of(notice, now)
        if stage is self._stage:
            return
        before, self._stage = self._stage, stage
        if notice is None:
            log.warning("The preemption notice of this gateway's node was withdrawn; requests are accepted again.")
            self._router.reopen()
            return
        reason = _reason(notice)
        if before is Stage.OPEN:
            log.warning("%s Health checks fail from now on; running requests may finish.", reason)
        self._router.close(reason, admits=stage is Stage.NOT_READY)
        if stage is Stage.ENDED:
            num_ended = self._router.end_streams(unfinished_error(reason))
            log.warning("%s %d running requests were ended.", reason, num_ended)


def unfinished_error(reason: str) -> HTTPError:
    """The error that the client of an unfinished request gets."""
    return HTTPError(
        503,
        f"{reason} This request was not complete in time.",
        remedy="Send it again, to another server or after a restart.",
        code="server_leaving",
        headers={"Retry-After": "5"},
    )


def _reason(notice: NodeNotice) -> str:
    at = time.strftime("%H:%M:%S UTC", time.gmtime(notice.deadline))
    return f"This server shuts down at {at}: {notice.cause}"
