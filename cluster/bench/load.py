"""Sends planned requests to one server, in a closed loop or at their times, and collects their outcomes.

Knows when a request begins: in an open loop at its scheduled time, even if it could only be sent later, so that a slow server cannot slow
down the load and hide the time that requests wait (coordinated omission). Knows no text and no statistics.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from cluster.bench.exchange import Outcome
from cluster.bench.own_cost import OwnCost, watch_own_cost
from cluster.bench.workload import Planned

PAUSE_S = 0.1  # of a stream after a failure, so that a dead server is not asked thousands of times a second
MAX_PAUSE_S = 30.0  # of a stream that the server tells to come later
Send = Callable[[int, Outcome], Awaitable[None]]


@dataclass(slots=True)
class Clock:
    """The times of a load; tests have their own. sleep: waits at least so many seconds."""

    now: Callable[[], float]
    sleep: Callable[[float], Awaitable[None]]


@dataclass(slots=True)
class Loaded:
    """What came of a load. num_cut: requests that were running when it was stopped; num_left: that were never sent."""

    outcomes: list[Outcome] = field(default_factory=list)
    began_s: float = 0.0
    ended_s: float = 0.0
    num_cut: int = 0
    num_left: int = 0
    cost: OwnCost = field(default_factory=OwnCost)


async def run_load(
    planned: Sequence[Planned],
    send: Send,
    *,
    num_streams: int | None,
    clock: Clock,
    stop: asyncio.Event,
    limit_s: float | None = None,
    seen: Callable[[Outcome], None] = lambda _: None,
) -> Loaded:
    """send: sends the request with this index and fills its outcome. num_streams: of a closed loop; None sends each at its time.

    limit_s: no request is sent after so many seconds. stop: ends the load at once; what has ended by then is kept.
    """
    loaded = Loaded()
    run = _Run(planned, send, clock, loaded, limit_s, seen)
    with watch_own_cost() as loaded.cost:
        loaded.began_s = clock.now()
        load = asyncio.create_task(run.open() if num_streams is None else run.closed(num_streams))
        stopped = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait((load, stopped), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (load, stopped):
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await load
        loaded.ended_s = clock.now()
    loaded.num_cut = run.num_sent - len(loaded.outcomes)
    loaded.num_left = len(planned) - run.num_sent
    return loaded


class _Run:
    def __init__(
        self,
        planned: Sequence[Planned],
        send: Send,
        clock: Clock,
        loaded: Loaded,
        limit_s: float | None,
        seen: Callable[[Outcome], None],
    ) -> None:
        self.num_sent = 0
        self._planned = planned
        self._send = send
        self._clock = clock
        self._loaded = loaded
        self._limit_s = limit_s
        self._seen = seen

    async def closed(self, num_streams: int) -> None:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(min(num_streams, len(self._planned))):
                tasks.create_task(self._stream())

    async def open(self) -> None:
        began_s = self._loaded.began_s
        async with asyncio.TaskGroup() as tasks:
            while (index := self.num_sent) < len(self._planned):
                due_s = began_s + (self._planned[index].at_s or 0.0)
                if self._limit_s is not None and due_s - began_s > self._limit_s:
                    return
                if (wait_s := due_s - self._clock.now()) > 0:
                    await self._clock.sleep(wait_s)
                self.num_sent += 1
                tasks.create_task(self._one(index, due_s))

    async def _stream(self) -> None:
        while (index := self.num_sent) < len(self._planned):
            asked_s = self._clock.now()
            if self._limit_s is not None and asked_s - self._loaded.began_s > self._limit_s:
                return
            self.num_sent += 1
            failure = (await self._one(index, asked_s)).failure
            if failure is not None:
                pause_s = PAUSE_S if failure.retry_after_s is None else failure.retry_after_s
                await self._clock.sleep(min(pause_s, MAX_PAUSE_S))

    async def _one(self, index: int, asked_s: float) -> Outcome:
        outcome = Outcome(asked_s, self._clock.now(), self._planned[index].num_output)
        await self._send(index, outcome)
        outcome.ended_s = self._clock.now()
        self._loaded.outcomes.append(outcome)
        self._seen(outcome)
        return outcome
