"""Compares the desired replicas with the running ones and acts: starts, watches, replaces with backoff, drains, stops.

Decides in pure functions (`plan`, `backoff_s`) and acts on `ManagedReplica`s. Knows no Ray, no sockets and no traffic; the desired number
is decided elsewhere.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from cluster.controller.adapters import AdapterHolder
from cluster.protocol.spec import ClusterSpec
from cluster.protocol.view import ReplicaRecord, ReplicaState, StartFailure
from workers.errors import CheckpointError, ConfigError, TramontaneError

log = logging.getLogger(__name__)

TICK_S = 0.25
PROVEN_AFTER_S = 10.0  # a replica that served this long did not fail to start
MAX_BACKOFF_S = 30.0
# By then a lost replica's resources are free. Ray looks for free resources at once, but then not again for a second.
RELEASE_S = 0.5
DRAIN_MARGIN_S = 5.0  # after `drain_until`, for gateways to move running streams
SAME_TIME_S = 1.0


class ManagedReplica(Protocol):
    """One replica from start to end, as the supervisor sees it."""

    @property
    def replica_id(self) -> str: ...

    @property
    def adapters(self) -> AdapterHolder: ...

    def record(self) -> ReplicaRecord:
        """The current state: PLACING, STARTING or READY. The supervisor adds its own decisions."""

    async def start(self) -> None:
        """Returns when the replica is ready. Raises TramontaneError."""

    def lost_reason(self, now: float) -> str | None:
        """Why a replica that was ready is lost, one sentence; None while it is not. now: time.monotonic()."""

    async def close(self, reason: str | None) -> None:
        """Ends every process and releases the resources. Idempotent, never raises."""


@dataclass(frozen=True, slots=True)
class Start:
    replica_id: str


@dataclass(frozen=True, slots=True)
class Drain:
    replica_id: str


def plan(desired: int, replicas: Sequence[ReplicaRecord], *, prefix: str = "") -> list[Start | Drain]:
    """The actions that bring the live replicas to `desired`. New replicas take the smallest free number; the least useful are drained
    first. prefix: of the replicas' ids.
    """
    live = [r for r in replicas if r.state not in (ReplicaState.DRAINING, ReplicaState.LOST)]
    if len(live) > desired:
        progress = {ReplicaState.PLACING: 0, ReplicaState.STARTING: 1, ReplicaState.READY: 2}
        live.sort(key=lambda r: (progress[r.state], r.load.num_running + r.load.num_waiting, -r.started_at))
        return [Drain(r.replica_id) for r in live[: len(live) - desired]]
    taken = {r.replica_id for r in replicas}
    ids = (f"{prefix}r{i}" for i in range(len(taken) + desired + 1))
    free = (name for name in ids if name not in taken)
    return [Start(next(free)) for _ in range(desired - len(live))]


def backoff_s(num_failures: int) -> float:
    """Seconds to wait before the next start after this many failures in a row: 0, 0, 1, 2, 4, ... MAX_BACKOFF_S."""
    return 0.0 if num_failures < 2 else min(2.0 ** (num_failures - 2), MAX_BACKOFF_S)


def permanent_failure(error: BaseException) -> StartFailure | None:
    """The failure to report if starting again cannot help; None for all other errors."""
    match error:
        case ConfigError():
            return StartFailure(kind="config", message=error.message, remedy=error.remedy)
        case CheckpointError():
            return StartFailure(kind="checkpoint", message=error.message, remedy=error.remedy)
    return None


@dataclass
class _Entry:
    replica: ManagedReplica
    starting: asyncio.Task[None] | None = None
    closing: asyncio.Task[None] | None = None
    state: ReplicaState | None = None  # DRAINING or LOST once decided; None: the replica's own
    reason: str | None = None
    drain_until: float | None = None
    is_leaving: bool = False
    ready_at: float | None = None
    lost_at: float | None = None

    def record(self) -> ReplicaRecord:
        record = replace(
            self.replica.record(), ready_at=self.ready_at, drain_until=self.drain_until, is_leaving=self.is_leaving
        )
        return record if self.state is None else replace(record, state=self.state, reason=self.reason or record.reason)


class Supervisor:
    """`await run()` in a task until cancelled; set `desired` and call `wake()`. All on one event loop.

    prefix: see `plan`. num_streams(replica_id): how many streams gateways still have there; None if some have not reported since the drain
    began.
    on_change: called whenever a record's state may have changed.
    """

    def __init__(
        self,
        make_replica: Callable[[str], ManagedReplica],
        *,
        prefix: str = "",
        num_streams: Callable[[str], int | None] = lambda _: 0,
        on_change: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.desired = 0
        self.drain_timeout_s = ClusterSpec.drain_timeout_s
        self.failure: StartFailure | None = None  # the first start cannot succeed: none is tried until `forgive`
        self.is_ending = False  # the whole cluster is about to end, so nothing is started
        self._make_replica = make_replica
        self._prefix = prefix
        self._num_streams = num_streams
        self._on_change = on_change
        self._clock = clock
        self._wall_clock = wall_clock
        self._entries: dict[str, _Entry] = {}
        self._num_failures = 0
        self._no_start_before = 0.0
        self._has_served = False  # a spec that worked once is retried after any error
        self._woken = asyncio.Event()

    def records(self) -> tuple[ReplicaRecord, ...]:
        return tuple(entry.record() for entry in self._entries.values())

    def serving(self) -> list[ManagedReplica]:
        """The replicas that may have requests, draining ones too."""
        entries = [e for e in self._entries.values() if e.closing is None and e.state is not ReplicaState.LOST]
        return [e.replica for e in entries if e.replica.record().state is ReplicaState.READY]

    def wake(self) -> None:
        """Runs the next round now instead of a tick later."""
        self._woken.set()

    def forgive(self) -> None:
        """Forgets failures: the next tick may start replicas again."""
        self.failure, self._num_failures, self._no_start_before = None, 0, 0.0
        self._has_served = any(e.ready_at is not None for e in self._entries.values())
        self.wake()

    def adopt(self, replica: ManagedReplica) -> None:
        """Takes over a running replica."""
        self._entries[replica.replica_id] = _Entry(replica, ready_at=self._wall_clock())
        self._has_served = True
        self._on_change()

    def drain(
        self, replica_id: str, *, grace_s: float | None = None, reason: str | None = None, is_leaving: bool = False
    ) -> None:
        """Sends the replica no new requests, gives running streams `grace_s` before they move, then stops it. Raises KeyError.

        is_leaving: its node is preempted. Streams move as soon as another replica has room; until one is ready, it keeps serving.
        A second drain can only shorten the first.
        """
        entry = self._entries[replica_id]
        if entry.state is ReplicaState.LOST:
            return
        until = self._wall_clock() + (self.drain_timeout_s if grace_s is None else grace_s)
        known = entry.drain_until
        if known is not None and known <= until + SAME_TIME_S and entry.is_leaving >= is_leaving:
            return
        entry.drain_until = until if known is None else min(until, known)
        entry.reason = (reason if is_leaving else entry.reason) or reason or f"Replica {replica_id} is being drained."
        entry.is_leaving = entry.is_leaving or is_leaving
        entry.state = ReplicaState.DRAINING
        log.info("%s Running streams move in %.0f s.", entry.reason, entry.drain_until - self._wall_clock())
        self._on_change()
        self.wake()

    async def run(self) -> None:
        while True:
            self._woken.clear()
            try:
                self.tick()
            except Exception as e:  # an error of one replica must not end the supervision of all
                log.exception("A round of supervision failed: %s", e)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TICK_S):
                    await self._woken.wait()

    async def close(self) -> None:
        """Ends every replica."""
        self.desired = 0
        # For requests that arrive during the shutdown.
        self.failure = StartFailure(kind="stopping", message="The deployment is being taken down.")
        for replica_id, entry in self._entries.items():
            if entry.state is None:
                entry.state, entry.drain_until = ReplicaState.DRAINING, self._wall_clock()
            self._end(replica_id, entry, None)
        await asyncio.gather(*(e.closing for e in self._entries.values() if e.closing), return_exceptions=True)

    def tick(self) -> None:
        """One round of watching and acting."""
        now = self._clock()
        for replica_id, entry in list(self._entries.items()):
            self._watch(replica_id, entry, now)
        for action in plan(self.desired, self.records(), prefix=self._prefix):
            match action:
                case Drain(replica_id):
                    self.drain(replica_id, reason=f"Replica {replica_id} is no longer needed.")
                case Start(replica_id) if self._may_start(now):
                    self._start(replica_id)

    def _may_start(self, now: float) -> bool:
        if self.failure is not None or self.is_ending or now < self._no_start_before:
            return False
        return not any(e.lost_at is not None and now - e.lost_at < RELEASE_S for e in self._entries.values())

    def _start(self, replica_id: str) -> None:
        entry = self._entries[replica_id] = _Entry(self._make_replica(replica_id))
        entry.starting = asyncio.create_task(entry.replica.start(), name=f"start-{replica_id}")
        entry.starting.add_done_callback(lambda _: self.wake())
        self._on_change()

    def _watch(self, replica_id: str, entry: _Entry, now: float) -> None:
        if entry.closing is not None:
            if entry.closing.done():
                del self._entries[replica_id]
                self._on_change()
            return
        if entry.starting is not None and entry.starting.done():
            self._started(replica_id, entry, now)
        elif entry.state is ReplicaState.DRAINING:
            self._drained(replica_id, entry, now)
        elif entry.ready_at is not None:
            if (reason := entry.replica.lost_reason(now)) is not None:
                self._lost(replica_id, entry, reason, now)
            elif self._num_failures and self._wall_clock() - entry.ready_at > PROVEN_AFTER_S:
                self._num_failures = 0

    def _started(self, replica_id: str, entry: _Entry, now: float) -> None:
        assert entry.starting is not None
        error = None if entry.starting.cancelled() else entry.starting.exception()
        entry.starting = None
        if error is None:
            entry.ready_at = self._wall_clock()
            self._has_served = True
            log.info("Replica %s is ready.", replica_id)
            self._on_change()
            return
        if not isinstance(error, TramontaneError):
            log.error("Replica %s could not be started.", replica_id, exc_info=error)
        if not self._has_served:
            self.failure = permanent_failure(error) or self.failure
        self._lost(replica_id, entry, str(error), now)

    def _lost(self, replica_id: str, entry: _Entry, reason: str, now: float) -> None:
        proven = entry.ready_at is not None and self._wall_clock() - entry.ready_at > PROVEN_AFTER_S
        self._num_failures = 0 if proven else self._num_failures + 1
        self._no_start_before = now + backoff_s(self._num_failures)
        log.warning("Replica %s is lost: %s", replica_id, reason)
        entry.state, entry.reason, entry.lost_at = ReplicaState.LOST, reason, now
        self._end(replica_id, entry, reason)

    def _drained(self, replica_id: str, entry: _Entry, now: float) -> None:
        assert entry.drain_until is not None
        late = self._wall_clock() > entry.drain_until + DRAIN_MARGIN_S
        gone = entry.ready_at is None or entry.replica.lost_reason(now) is not None
        if gone or late or (self._num_streams(replica_id) == 0 and not self._is_last_resort(entry)):
            self._end(replica_id, entry, entry.reason)

    def _is_last_resort(self, entry: _Entry) -> bool:
        """While there is time, a replica on a preempted node keeps serving until another one can."""
        assert entry.drain_until is not None
        others = any(e.state is None and e.ready_at is not None for e in self._entries.values())
        return entry.is_leaving and not others and self.desired > 0 and self._wall_clock() < entry.drain_until

    def _end(self, replica_id: str, entry: _Entry, reason: str | None) -> None:
        if entry.closing is None:
            if entry.starting is not None:
                entry.starting.cancel()
            entry.closing = asyncio.create_task(entry.replica.close(reason), name=f"close-{replica_id}")
            entry.closing.add_done_callback(lambda _: self.wake())
            self._on_change()
