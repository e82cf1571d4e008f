"""A gateway's connections to the replicas: syncs with the controller, connects to every replica, and updates the router.

Knows views, clients and the router's `update`; no Ray and no HTTP. While the controller is down (Ray restarts it), the last view stays in
use: a gateway learns of a dead replica from its socket, not from the controller.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from cluster.controller.preemption.decide import head_notice
from cluster.protocol.report import GatewayReport
from cluster.protocol.view import ClusterView, ReplicaRecord, ReplicaState
from cluster.replicas.client import ReplicaClient
from cluster.router.replica import Availability, Replica
from workers.errors import ReplicaUnavailableError, TramontaneError

log = logging.getLogger(__name__)

RETRY_S = 0.5
Key = tuple[str, str]  # replica id, incarnation


class Controller(Protocol):
    """The controller, as a gateway sees it. Methods raise ReplicaUnavailableError while it cannot be reached."""

    async def sync(self, known: int, report: GatewayReport | None) -> ClusterView: ...
    async def leave(self, gateway_id: str) -> None: ...


class ReplicaSink(Protocol):
    """The router, as the fleet sees it."""

    def update(self, replicas: Sequence[Replica], availability: Availability) -> None: ...
    def report(self, gateway_id: str, url: str) -> GatewayReport: ...


class Fleet:
    """`await run()` in a task until cancelled, then `await close()`. on_view: called with every new view."""

    def __init__(
        self,
        controller: Controller,
        router: ReplicaSink,
        *,
        gateway_id: str,
        url: str,
        on_view: Callable[[ClusterView], None] = lambda _: None,
        adapter_streams: Callable[[], dict[str, int]] = dict,
    ) -> None:
        self.view: ClusterView | None = None
        self._controller = controller
        self._router = router
        self._gateway_id = gateway_id
        self._url = url
        self._on_view = on_view
        self._adapter_streams = adapter_streams
        self._clients: dict[Key, ReplicaClient] = {}
        self._connected: set[Key] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def clients(self) -> Mapping[Key, ReplicaClient]:
        """The connections, open or being opened."""
        return self._clients

    @property
    def num_pending(self) -> int:
        """How many connections are being opened or closed."""
        return len(self._tasks)

    async def run(self) -> None:
        is_down = False
        while True:
            known = -1 if self.view is None else self.view.version
            try:
                report = self._router.report(self._gateway_id, self._url)
                report = replace(report, streams_per_adapter=self._adapter_streams())
                self._handle_view(await self._controller.sync(known, report))
            except ReplicaUnavailableError as e:
                (log.debug if is_down else log.warning)("%s Routing continues with the last view of the cluster.", e)
                is_down = True
                await asyncio.sleep(RETRY_S)
            except Exception as e:  # a gateway that stops syncing would be worse than any error
                log.exception("A view of the cluster could not be handled: %s", e)
                await asyncio.sleep(RETRY_S)
            else:
                is_down = False

    async def close(self) -> None:
        """Leaves the controller and closes every connection."""
        with contextlib.suppress(TramontaneError):
            await self._controller.leave(self._gateway_id)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, *(c.close() for c in self._clients.values()), return_exceptions=True)

    def _handle_view(self, view: ClusterView) -> None:
        self.view = view
        records = {(r.replica_id, r.incarnation): r for r in view.replicas}
        for key in [k for k in self._clients if k not in records or records[k].state is ReplicaState.LOST]:
            self._drop(key, records[key].reason if key in records else None)
        for key, record in records.items():
            if record.state in (ReplicaState.READY, ReplicaState.DRAINING):
                self._keep(key, record)
        self._update_router()
        self._on_view(view)

    def _keep(self, key: Key, record: ReplicaRecord) -> None:
        client = self._clients.get(key)
        if client is None:
            assert record.address is not None and record.token is not None, f"replica {key} is ready but has no address"
            client = self._clients[key] = ReplicaClient(record.replica_id, record.address, record.token)
            self._spawn(self._connect(key, client))
        client.is_leaving = record.is_leaving
        client.drain_until = None if record.drain_until is None else time.monotonic() + record.drain_until - time.time()

    async def _connect(self, key: Key, client: ReplicaClient) -> None:
        while self._clients.get(key) is client:
            try:
                await client.connect()
            except ReplicaUnavailableError as e:
                log.info("%s", e)
                await asyncio.sleep(RETRY_S)
            else:
                if self._clients.get(key) is not client:  # dropped and closed before it was connected
                    await client.close()
                    return
                self._connected.add(key)
                self._update_router()
                return

    def _drop(self, key: Key, reason: str | None) -> None:
        client = self._clients.pop(key)
        self._connected.discard(key)
        client.condemn(reason or f"Replica {client.replica_id} has ended.")
        self._spawn(client.close())

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _update_router(self) -> None:
        if self.view is not None:
            self._router.update([self._clients[key] for key in sorted(self._connected)], availability_of(self.view))


def availability_of(view: ClusterView) -> Availability:
    """What the view says beyond the replicas that are ready."""
    reasons = [describe(r) for r in view.replicas if r.state is not ReplicaState.READY]
    reason = str(view.failure) if view.failure else " ".join(reasons) or None
    scaled_to_zero = view.num_desired == 0 and view.facts is not None and view.failure is None
    # Nothing is started once the head node is about to be removed.
    can_start = view.failure is None and head_notice(view.notices, time.time()) is None
    expected = can_start and (scaled_to_zero or view.num_desired > 0)
    return Availability(expected=expected, reason=reason, facts=view.facts, scaled_to_zero=scaled_to_zero)


def describe(record: ReplicaRecord) -> str:
    """One sentence about a replica that is not ready."""
    if record.reason:
        return record.reason
    if record.state is ReplicaState.PLACING:
        return f"Replica {record.replica_id} waits for free resources."
    done, total = record.progress
    loaded = f" ({100 * done // total} %)" if record.phase == "loading" and total else ""
    return f"Replica {record.replica_id} is {record.phase or record.state}{loaded}."
