"""Assigns queued sequences to replicas as late as possible: the choice is made when there is room.

Knows the table, the queue and the timers. Woken by finished streams, frames, changes of the replicas and, while requests queue, by time.
Knows no deltas and no admission.
"""

import asyncio
from collections.abc import Callable, Iterable

from cluster.protocol.routing import RoutingPolicy
from cluster.router.admission.bounds import retry_after_s
from cluster.router.admission.request_queue import RequestQueue, Waiter
from cluster.router.load_balancing.table import Assignment, ReplicaEntry, ReplicaTable
from cluster.router.numerics import MAX_WAIT_S, required_numerics
from cluster.router.replica import Availability, Replica
from cluster.router.stream import Stream, StreamMovedError
from workers.errors import OverloadedError, ReplicaUnavailableError

TICK_S = 0.1
# A stream that has begun waits this many times as long to resume: a pause is better than an error.
STARTED_TIMEOUT_FACTOR = 10


class Dispatcher:
    """`describe` says why no replica is ready. Every `assign` is followed by a `leave`. numerics_wait_s: see `required_numerics`."""

    def __init__(
        self,
        policy: RoutingPolicy,
        *,
        queue_timeout_s: float,
        clock: Callable[[], float],
        describe: Callable[[], str],
        numerics_wait_s: float = MAX_WAIT_S,
    ) -> None:
        self.table = ReplicaTable(policy, clock, self._on_report)
        self.queue: RequestQueue[Assignment] = RequestQueue()
        self.availability = Availability()
        self._queue_timeout_s = queue_timeout_s
        self._numerics_wait_s = numerics_wait_s
        self._clock = clock
        self._describe = describe
        self._timer: asyncio.TimerHandle | None = None

    @property
    def may_recover(self) -> bool:
        """Whether there is a replica, or may be one, for the requests that wait."""
        return self.availability.expected or any(
            entry.replica.condemned is None and (entry.replica.drain_until is None or self.table.is_ready(entry))
            for entry in self.table
        )

    def update(self, replicas: Iterable[Replica], availability: Availability) -> None:
        """Replaces the set of replicas. Streams on removed ones continue until those end them."""
        self.availability = availability
        self.table.update(list(replicas))
        for entry in self.table:
            self._watch_drain(entry)
        self._dispatch()

    async def assign(self, stream: Stream) -> Assignment:
        """Waits for the stream's turn and for room. Raises ReplicaUnavailableError if no replica can be expected, OverloadedError or
        ReplicaUnavailableError after the queue timeout.
        """
        while True:
            waiter = self.queue.join(stream, now=self._clock())
            self._dispatch()
            assignment = await self._result_of(waiter)
            if assignment is not None and self.table.is_ready(assignment.entry):
                return assignment
            if assignment is not None:  # lost before anything was sent there
                self.leave(assignment.entry, stream)

    def leave(self, entry: ReplicaEntry, stream: Stream) -> None:
        """The stream is no longer on that replica."""
        self.table.leave(entry, stream)
        stream.interrupt.forget(StreamMovedError)
        if self.queue:
            self._dispatch()

    async def _result_of(self, waiter: Waiter[Assignment]) -> Assignment | None:
        """None if the replica began to drain before the stream got there."""
        if waiter.future.done():
            return waiter.future.result()
        stream = waiter.stream
        if stream.trace.spans is not None:
            stream.trace.spans.queued()
        timeout_s = self._queue_timeout_s * (STARTED_TIMEOUT_FACTOR if stream.output_token_ids else 1)
        timer = asyncio.get_running_loop().call_later(timeout_s, self._time_out, waiter, timeout_s)
        try:
            return await stream.interrupt.wait(lambda: waiter.future)
        except BaseException as e:
            future = waiter.future
            if future.done() and not future.cancelled() and future.exception() is None:
                self.leave(future.result().entry, stream)
                if isinstance(e, StreamMovedError):
                    return None
            raise
        finally:
            timer.cancel()
            self.queue.leave(waiter)

    def _dispatch(self) -> None:
        set_aside: list[Waiter[Assignment]] = []
        full: set[str] = set()
        while (waiter := self.queue.first()) is not None:
            numerics = self._required_numerics(waiter)
            assignment = None if numerics in full else self.table.choose(waiter.stream, numerics=numerics)
            if assignment is not None:
                self.table.enter(assignment.entry, waiter.stream, assignment.decision.num_cached_tokens)
                self.queue.serve(waiter, assignment)
            elif numerics is None:
                break
            else:
                # It waits for certain replicas; those after it may have room on others.
                full.add(numerics)
                set_aside.append(self.queue.set_aside())
        self.queue.put_back(set_aside)
        if not self.queue:
            return
        if not self.may_recover:
            for waiter in self.queue:
                self.queue.fail(waiter, ReplicaUnavailableError(self._describe()))
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(TICK_S, self._tick)

    def _required_numerics(self, waiter: Waiter[Assignment]) -> str | None:
        produced_by = waiter.stream.numerics
        if produced_by is None:
            return None
        may_serve = (e for e in self.table if e.replica.condemned is None and e.replica.drain_until is None)
        return required_numerics(
            produced_by,
            {entry.numerics for entry in may_serve},
            expected=self.availability.expected,
            waited_s=self._clock() - waiter.since,
            max_wait_s=self._numerics_wait_s,
        )

    def _tick(self) -> None:
        self._timer = None
        if self.queue:
            self.table.refresh()
            self._dispatch()

    def _on_report(self, entry: ReplicaEntry) -> None:
        self._watch_drain(entry)
        first = self.queue.first()
        if first is not None and (self.table.has_room(entry, first.stream) or not self.may_recover):
            self._dispatch()

    def _time_out(self, waiter: Waiter[Assignment], timeout_s: float) -> None:
        if self.table.any_ready:
            error: Exception = OverloadedError(
                f"No replica had room for the request within {timeout_s:g} s.",
                remedy="Try again later.",
                retry_after_s=retry_after_s(None),
            )
        else:
            error = ReplicaUnavailableError(
                f"{self._describe()} The request waited {timeout_s:g} s at the router, the longest a request may wait."
            )
        self.queue.fail(waiter, error)

    def _watch_drain(self, entry: ReplicaEntry) -> None:
        until = entry.replica.drain_until
        if until is None or not entry.streams:
            return
        if entry.replica.is_leaving:
            self._move_to_room(entry)
        if entry.move_timer is not None:
            return
        delay = max(0.0, until - self._clock())
        entry.move_timer = asyncio.get_running_loop().call_later(delay, self._move_streams, entry)

    def _move_streams(self, entry: ReplicaEntry) -> None:
        entry.move_timer = None
        until = entry.replica.drain_until
        if until is None or not entry.streams:
            return
        if until > self._clock():  # postponed since the timer was set
            self._watch_drain(entry)
        # Without another replica to go to, the streams stay, and the next frame tries again.
        elif self.availability.expected or self.table.any_ready:
            for stream in sorted(entry.streams, key=lambda stream: stream.order):
                self._move(entry, stream)

    def _move_to_room(self, entry: ReplicaEntry) -> None:
        """Moves as many streams as have room elsewhere, those with tokens only where the numerics are the same."""
        num_waiting = len(self.queue)
        room = self.table.online_room() - num_waiting
        same = self.table.online_room(numerics=entry.numerics) - num_waiting
        for stream in sorted(entry.streams, key=lambda stream: stream.order):
            if room <= 0:
                break
            if stream.numerics is not None:
                if same <= 0:
                    continue
                same -= 1
            room -= 1
            self._move(entry, stream)

    def _move(self, entry: ReplicaEntry, stream: Stream) -> None:
        stream.interrupt.set(StreamMovedError(f"Replica {entry.replica.replica_id} is being drained."))
