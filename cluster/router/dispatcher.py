"""Hands places on replicas to those that wait for them, as late as possible: the choice is made when there is room.

Knows the table, the line and the timers. Woken by ended streams, frames, news of replicas and, while anyone waits, by time. Knows no
deltas and no admission.
"""

import asyncio
from collections.abc import Callable, Iterable

from cluster.router.admission import retry_after_s
from cluster.router.policy import PolicyName
from cluster.router.replica import Outlook, Replica
from cluster.router.stream import Stream, StreamMovedError
from cluster.router.table import Place, ReplicaTable, Seat
from cluster.router.waiting import Waiter, WaitingLine
from workers.errors import OverloadedError, ReplicaUnavailableError

TICK_S = 0.1
BEGUN_PATIENCE = 10  # times as long a stream that has begun waits to go on: a pause is better than an end


class Dispatcher:
    """`describe` words why no replica is ready. Every `place` is followed by a `leave`."""

    def __init__(
        self, policy: PolicyName, *, queue_timeout_s: float, clock: Callable[[], float], describe: Callable[[], str]
    ) -> None:
        self.table = ReplicaTable(policy, clock, self._on_news)
        self.line: WaitingLine[Place] = WaitingLine()
        self.outlook = Outlook()
        self._queue_timeout_s = queue_timeout_s
        self._clock = clock
        self._describe = describe
        self._timer: asyncio.TimerHandle | None = None

    @property
    def has_hope(self) -> bool:
        """Whether there is a replica, or may be one, for whoever waits."""
        return self.outlook.expected or any(
            seat.replica.condemned is None and (seat.replica.drain_until is None or self.table.is_ready(seat))
            for seat in self.table
        )

    def update(self, replicas: Iterable[Replica], outlook: Outlook) -> None:
        """From now on it is these replicas. Streams on others go on until those let them fall."""
        self.outlook = outlook
        self.table.update(list(replicas))
        for seat in self.table:
            self._watch_drain(seat)
        self._dispatch()

    async def place(self, stream: Stream) -> Place:
        """Waits for the stream's turn and for room. Raises ReplicaUnavailableError when there is no hope, or no more patience."""
        while True:
            waiter = self.line.join(stream, now=self._clock())
            self._dispatch()
            place = await self._turn_of(waiter)
            if place is not None and self.table.is_ready(place.seat):
                return place
            if place is not None:  # lost before anything was sent there
                self.leave(place.seat, stream)

    def leave(self, seat: Seat, stream: Stream) -> None:
        """The stream is not on that replica any more."""
        self.table.leave(seat, stream)
        stream.interrupt.forget(StreamMovedError)
        if self.line:
            self._dispatch()

    async def _turn_of(self, waiter: Waiter[Place]) -> Place | None:
        """Its place; None when the replica began to drain on the way there."""
        if waiter.future.done():
            return waiter.future.result()
        stream = waiter.stream
        patience_s = self._queue_timeout_s * (BEGUN_PATIENCE if stream.output_token_ids else 1)
        timer = asyncio.get_running_loop().call_later(patience_s, self._lose_patience, waiter, patience_s)
        try:
            return await stream.interrupt.wait(lambda: waiter.future)
        except BaseException as e:
            future = waiter.future
            if future.done() and not future.cancelled() and future.exception() is None:
                self.leave(future.result().seat, stream)
                if isinstance(e, StreamMovedError):
                    return None
            raise
        finally:
            timer.cancel()
            self.line.leave(waiter)

    def _dispatch(self) -> None:
        while (waiter := self.line.first()) is not None:
            place = self.table.choose(waiter.stream)
            if place is None:
                break
            self.table.enter(place.seat, waiter.stream, place.decision.num_cached_tokens)
            self.line.serve(waiter, place)
        if not self.line:
            return
        if not self.has_hope:
            for waiter in self.line:
                self.line.fail(waiter, ReplicaUnavailableError(self._describe()))
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(TICK_S, self._tick)

    def _tick(self) -> None:
        self._timer = None
        if self.line:
            self.table.sweep()
            self._dispatch()

    def _on_news(self, seat: Seat) -> None:
        self._watch_drain(seat)
        first = self.line.first()
        if first is not None and (self.table.has_room(seat, first.stream) or not self.has_hope):
            self._dispatch()

    def _lose_patience(self, waiter: Waiter[Place], patience_s: float) -> None:
        waited = f"It waited {patience_s:g} s at the router"
        if self.table.any_ready:
            error: Exception = OverloadedError(
                f"{waited}, and no replica had room; try again later.", retry_after_s=retry_after_s(None)
            )
        else:
            error = ReplicaUnavailableError(f"{self._describe()} {waited}, which is as long as a request may.")
        self.line.fail(waiter, error)

    def _watch_drain(self, seat: Seat) -> None:
        until = seat.replica.drain_until
        if until is None or not seat.streams:
            return
        if seat.replica.is_leaving:
            self._move(seat, self.table.room_elsewhere() - len(self.line))
        if seat.move_timer is not None:
            return
        delay = max(0.0, until - self._clock())
        seat.move_timer = asyncio.get_running_loop().call_later(delay, self._move_streams, seat)

    def _move_streams(self, seat: Seat) -> None:
        seat.move_timer = None
        until = seat.replica.drain_until
        if until is None or not seat.streams:
            return
        if until > self._clock():  # put off meanwhile
            self._watch_drain(seat)
        elif (
            self.outlook.expected or self.table.any_ready
        ):  # else nowhere to go: they stay, and the next frame asks again
            self._move(seat, len(seat.streams))

    def _move(self, seat: Seat, most: int) -> None:
        for stream in sorted(seat.streams, key=lambda stream: stream.order)[: max(most, 0)]:
            stream.interrupt.set(StreamMovedError(f"Replica {seat.replica.replica_id} is being drained."))
