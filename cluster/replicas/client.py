"""The gateway's end of the socket to one replica's rank 0.

Knows frames, silence and which stream waits for which request; knows no Ray and no routing. Every open stream ends: with its
final delta, or with ReplicaUnavailableError when the connection breaks or stays silent for SILENCE_IS_DEATH_S, so that
the router can continue it elsewhere. A lost connection is retried until `close`.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Self

from cluster.replicas.connection import ReplicaConnection
from cluster.replicas.inbox import StreamInbox
from cluster.replicas.readiness import is_overdue, not_ready_reason
from workers.errors import ReplicaUnavailableError
from workers.heartbeat import RECENTLY_S, TICK_S, PeerClock
from workers.protocol import (
    SILENCE_IS_DEATH_S,
    Abort,
    CacheEvents,
    Ending,
    EngineFacts,
    FromReplica,
    GenerateRequest,
    Heartbeat,
    LoadReport,
    StepFrame,
    Submit,
    TokenDelta,
    ToReplica,
)

log = logging.getLogger(__name__)

RECONNECT_AFTER_S = 0.5


class ReplicaClient:
    """One replica as the router sees it. Use on one event loop: `await connect()`, then `generate`, at last `await close()`.

    drain_until: time.monotonic() at which running streams must move; None while it is not draining. is_leaving: its node is being
    removed, so streams move as soon as there is room elsewhere. Both are for the router; nothing here depends on them.
    """

    def __init__(self, replica_id: str, address: tuple[str, int], token: str) -> None:
        self.replica_id = replica_id
        self.drain_until: float | None = None
        self.is_leaving = False
        self._on_frame: Callable[[StepFrame], None] | None = None
        self._cached_blocks: set[bytes] = set()  # reported before `on_frame` was set; bounded by the replica's blocks
        self._address = address
        self._token = token
        self._facts: EngineFacts | None = None
        self._load = LoadReport()
        self._load_received = 0.0
        self._proved_ready = float("-inf")  # when the last report came that did
        self._streams: dict[str, StreamInbox] = {}
        self._connection: ReplicaConnection | None = None
        self._clock = PeerClock(time.monotonic())
        self._lost: str = "not connected yet"
        self._lost_by_silence = False  # so it may be back in a moment
        self._condemned: str | None = None
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        await self.connect()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def facts(self) -> EngineFacts:
        """What start-up learned. Raises ReplicaUnavailableError before the first connection."""
        if self._facts is None:
            raise ReplicaUnavailableError(f"Replica {self.replica_id} has not been reached yet.")
        return self._facts

    @property
    def load(self) -> LoadReport:
        """The newest report; `forward_age_s` counts from when it was received (see `not_ready_reason` for its age now)."""
        return self._load

    @property
    def on_frame(self) -> Callable[[StepFrame], None] | None:
        """Called with every frame. A new listener is called at once with what was reported before: the load and all cached blocks."""
        return self._on_frame

    @on_frame.setter
    def on_frame(self, listener: Callable[[StepFrame], None] | None) -> None:
        self._on_frame = listener
        if listener is not None and self._facts is not None:
            known, self._cached_blocks = self._cached_blocks, set()
            listener(StepFrame(deltas=[], load=self._load, cache=CacheEvents(stored=list(known), reset=True)))

    @property
    def connected(self) -> bool:
        """Whether the socket is open; a silent peer counts as connected until SILENCE_IS_DEATH_S have passed."""
        return self._connection is not None

    @property
    def condemned(self) -> str | None:
        """Why this replica is over for good, if it is."""
        return self._condemned

    @property
    def num_streams(self) -> int:
        """Streams open on this client."""
        return len(self._streams)

    def is_ready(self, now: float) -> bool:
        """Whether all ranks took part in a forward pass a moment ago. now: time.monotonic()."""
        return self.not_ready_reason(now) is None

    def not_ready_reason(self, now: float) -> str | None:
        """One sentence naming the replica and the rank, or None when ready. now: time.monotonic()."""
        if self._condemned is not None:
            return self._condemned
        if self._connection is None:
            return f"Replica {self.replica_id} has no connection to its rank 0: {self._lost}."
        # Up to when this process last ran: its own pauses do not count.
        if (silence_s := self._clock.silence_at_last_tick_s()) > RECENTLY_S:
            return f"Replica {self.replica_id} has not been heard from for {silence_s:.1f} s: its rank 0 is silent."
        return not_ready_reason(self.replica_id, self._load, report_age_s=now - self._load_received)

    def unhealthy_reason(self, now: float) -> str | None:
        """The same, but None for HEALTH_PATIENCE_S while nothing shows that the replica has ended. now: time.monotonic()."""
        reason = self.not_ready_reason(now)
        may_be_back = self._condemned is None and (self.connected or self._lost_by_silence)
        heard_until = self._clock.last_tick
        if may_be_back and not is_overdue(
            self._load,
            report_age_s=max(0.0, heard_until - self._load_received),
            ready_age_s=heard_until - self._proved_ready,
        ):
            return None
        return reason

    def condemn(self, reason: str, *, crashed: bool = False) -> None:
        """Declares the replica dead, on better evidence than the socket's, such as Ray's; every open stream ends.

        The first reason stays: later ones are usually its consequences. crashed: see ReplicaUnavailableError.
        """
        self._condemned = self._condemned or reason
        self._disconnect(reason, crashed=crashed)

    async def connect(self, timeout_s: float = 10.0) -> EngineFacts:
        """Opens the connection and keeps it. Raises ReplicaUnavailableError when rank 0 cannot be reached or refuses."""
        try:
            async with asyncio.timeout(timeout_s):
                connection = await self._open()
        except (OSError, TimeoutError, ValueError) as e:
            raise ReplicaUnavailableError(
                f"Replica {self.replica_id} could not be reached at {self._address[0]}:{self._address[1]}: {e!r}."
            ) from e
        self._task = asyncio.create_task(self._keep(connection), name=f"replica-client-{self.replica_id}")
        return self.facts

    async def close(self) -> None:
        """Ends every open stream and the connection. Idempotent."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        connection, self._connection = self._connection, None
        if connection is not None:
            self._lost = "the gateway closed the connection"
        self._disconnect(self._lost)
        if connection is not None:
            connection.abort()
            await connection.lost()

    async def generate(
        self, request: GenerateRequest, *, take: Callable[[TokenDelta], bool] | None = None
    ) -> AsyncIterator[TokenDelta]:
        """Yields the request's deltas until one has a finish_reason. Closing it early aborts the request. take: see Replica.generate.

        Raises ReplicaUnavailableError when the replica is lost; the deltas yielded so far stand. Raises RequestError when the caller
        reads too slowly (see StreamInbox).
        """
        if self._connection is None or self._condemned is not None:
            raise ReplicaUnavailableError(self.not_ready_reason(time.monotonic()) or "The replica is lost.")
        assert request.request_id not in self._streams, f"request id {request.request_id} is already in use"
        inbox = self._streams[request.request_id] = StreamInbox(take)
        try:
            self._send(Submit(request=request))
            while True:
                delta = await inbox.get()
                yield delta
                if delta.finish_reason is not None:
                    return
        finally:
            # Still listed: neither its last delta nor the end of the connection has arrived, so rank 0 still works on it.
            if self._streams.pop(request.request_id, None) is not None:
                self._send(Abort(request_id=request.request_id))

    def _send(self, message: ToReplica) -> None:
        if self._connection is not None:
            self._connection.send(message)
            self._clock.sent(time.monotonic())

    async def _open(self) -> ReplicaConnection:
        connection = await ReplicaConnection.open(self.replica_id, self._address, token=self._token)
        self._facts = connection.facts
        self._connection = connection  # before the frame: its listener may find the replica ready
        self._clock.restart(time.monotonic())
        self._handle(connection.first_frame)
        connection.listen(lambda message: self._receive(message))  # looked up each time: a profile replaces it
        return connection

    async def _keep(self, connection: ReplicaConnection) -> None:
        """Waits until the connection is lost, then opens a new one, until cancelled or condemned."""
        ticker = asyncio.create_task(self._tick())
        try:
            while True:
                error = await connection.lost()
                was_well = self._clock.was_well(time.monotonic())
                if error is None:
                    reason = self._lost if self._connection is None else "rank 0 closed the connection"
                    self._disconnect(reason, crashed=was_well)
                else:
                    crashed = isinstance(error, ConnectionError) and was_well
                    self._disconnect(str(error) or type(error).__name__, crashed=crashed)
                connection = await self._reopen()
        finally:
            ticker.cancel()

    def _receive(self, message: FromReplica) -> None:
        try:
            if isinstance(message, StepFrame):
                self._handle(message)
            elif isinstance(message, Ending):
                self.condemn(message.reason, crashed=message.crashed)
        except Exception as e:  # without a reader every stream would wait forever
            log.exception("A frame of replica %s could not be handled: %s", self.replica_id, e)
            self._disconnect(f"a frame could not be handled ({e!r})")

    async def _reopen(self) -> ReplicaConnection:
        while True:
            await asyncio.sleep(RECONNECT_AFTER_S)
            if self._condemned is not None:
                continue
            try:
                async with asyncio.timeout(SILENCE_IS_DEATH_S):
                    connection = await self._open()
            except (OSError, TimeoutError, ValueError, ReplicaUnavailableError) as e:
                self._lost_by_silence = self._lost_by_silence and not isinstance(e, ConnectionRefusedError)
                log.debug("Replica %s is still unreachable: %r", self.replica_id, e)
            except Exception as e:  # as above; most likely the listener's
                log.exception("A frame of replica %s could not be handled: %s", self.replica_id, e)
                self._disconnect(f"a frame could not be handled ({e!r})")
            else:
                log.info("Replica %s is connected again.", self.replica_id)
                return connection

    async def _tick(self) -> None:
        """Sends heartbeats; gives up a silent replica."""
        while True:
            await asyncio.sleep(TICK_S)
            now = time.monotonic()
            self._clock.tick(now)
            if self._connection is None:
                continue
            if (silence_s := self._clock.silence_s(now)) > SILENCE_IS_DEATH_S:
                self._disconnect(f"rank 0 has been silent for {silence_s:.1f} s", silent=True)
            elif self._clock.is_heartbeat_due(now):
                self._send(Heartbeat())

    def _handle(self, frame: StepFrame) -> None:
        now = time.monotonic()
        self._clock.received(now)
        self._load_received = now
        self._load = frame.load
        if not_ready_reason(self.replica_id, frame.load, report_age_s=0.0) is None:
            self._proved_ready = now
        for delta in frame.deltas:
            if delta.finish_reason is not None:
                inbox = self._streams.pop(delta.request_id, None)
            else:
                inbox = self._streams.get(delta.request_id)
            if (
                inbox is not None
                and not inbox.put(delta, now)
                and self._streams.pop(delta.request_id, None) is not None
            ):
                self._send(Abort(request_id=delta.request_id))
        if self._on_frame is not None:
            self._on_frame(frame)
        elif frame.cache is not None:
            if frame.cache.reset:
                self._cached_blocks.clear()
            self._cached_blocks.difference_update(frame.cache.evicted)
            self._cached_blocks.update(frame.cache.stored)

    def _disconnect(self, reason: str, *, crashed: bool = False, silent: bool = False) -> None:
        if self._connection is not None:
            log.warning("Replica %s is lost: %s.", self.replica_id, reason.removesuffix("."))
            self._connection.abort()
            self._connection = None
            self._lost = reason
            self._lost_by_silence = silent
        streams, self._streams = self._streams, {}
        for inbox in streams.values():
            message = self._condemned or f"Replica {self.replica_id} was lost: {reason}."
            inbox.end(ReplicaUnavailableError(message, crashed=crashed))
