"""When requests are sent and when their clocks begin, on a clock that the test advances."""

import asyncio
import heapq
import itertools

from cluster.bench.exchange import Failure, Outcome
from cluster.bench.load import PAUSE_S, Clock, Loaded, run_load
from cluster.bench.workload import Part, Planned


class FakeClock:
    """Goes on to the next sleeper's time as soon as nothing else can run."""

    def __init__(self) -> None:
        self.time_s = 0.0
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._numbers = itertools.count()

    async def sleep(self, seconds: float) -> None:
        future = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self.time_s + seconds, next(self._numbers), future))
        await future

    async def run(self) -> None:
        while True:
            for _ in range(30):
                await asyncio.sleep(0)
            if self._sleepers:
                due_s, _, future = heapq.heappop(self._sleepers)
                self.time_s = max(self.time_s, due_s)
                if not future.done():
                    future.set_result(None)


def plan(*at_s: float | None) -> list[Planned]:
    return [Planned((Part((i,), 1),), 4, at) for i, at in enumerate(at_s)]


class Server:
    """Answers one request after another, each in `service_s`; requests wait in its queue."""

    def __init__(self, clock: FakeClock, service_s: float, failures: dict[int, Failure] | None = None) -> None:
        self._clock, self._service_s, self._failures = clock, service_s, failures or {}
        self._turn = asyncio.Lock()
        self.num_running = self.most_running = 0

    async def send(self, index: int, outcome: Outcome) -> None:
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        try:
            outcome.failure = self._failures.get(index)
            if outcome.failure is None:
                async with self._turn:
                    await self._clock.sleep(self._service_s)
                outcome.times_s = [self._clock.time_s]
        finally:
            self.num_running -= 1


async def load(
    planned: list[Planned],
    server: Server,
    clock: FakeClock,
    *,
    num_streams: int | None = None,
    limit_s: float | None = None,
    stop_at_s: float | None = None,
) -> Loaded:
    stop = asyncio.Event()

    async def stop_later() -> None:
        assert stop_at_s is not None
        await clock.sleep(stop_at_s)
        stop.set()

    tasks = [asyncio.create_task(clock.run())]
    if stop_at_s is not None:
        tasks.append(asyncio.create_task(stop_later()))
    try:
        return await run_load(
            planned,
            server.send,
            num_streams=num_streams,
            clock=Clock(lambda: clock.time_s, clock.sleep),
            stop=stop,
            limit_s=limit_s,
        )
    finally:
        for task in tasks:
            task.cancel()


async def test_a_closed_loop_keeps_its_number_of_streams() -> None:
    clock = FakeClock()
    server = Server(clock, 1.0)
    loaded = await load(plan(*[None] * 7), server, clock, num_streams=3)
    assert server.most_running == 3
    assert len(loaded.outcomes) == 7
    assert loaded.ended_s - loaded.began_s == 7.0
    assert (loaded.num_cut, loaded.num_left) == (0, 0)


async def test_in_an_open_loop_the_clock_begins_at_the_scheduled_time() -> None:
    """Two requests a second to a server that needs a second for each: the wait in its queue belongs to the request."""
    clock = FakeClock()
    loaded = await load(plan(0.0, 0.5, 1.0, 1.5), Server(clock, 1.0), clock)
    assert [o.asked_s for o in loaded.outcomes] == [0.0, 0.5, 1.0, 1.5]
    assert [o.ttft_s for o in loaded.outcomes] == [1.0, 1.5, 2.0, 2.5]


async def test_a_request_that_is_sent_late_does_not_lose_its_wait() -> None:
    """The client's clock jumps over the second request's time, as it does when the client has no core."""
    clock = FakeClock()

    class Late(Server):
        async def send(self, index: int, outcome: Outcome) -> None:
            if index == 0:
                clock.time_s = 3.0
            await super().send(index, outcome)

    loaded = await load(plan(0.0, 1.0), Late(clock, 0.5), clock)
    late = next(o for o in loaded.outcomes if o.asked_s == 1.0)
    assert late.sent_s >= 3.0
    assert late.ttft_s >= 2.5


async def test_a_stream_pauses_after_a_failure_and_as_long_as_the_server_says() -> None:
    clock = FakeClock()
    failures = {0: Failure("HTTP 429", "busy", retry_after_s=5.0), 1: Failure("cannot connect", "refused")}
    loaded = await load(plan(None, None, None), Server(clock, 1.0, failures), clock, num_streams=1)
    assert [o.asked_s for o in loaded.outcomes] == [0.0, 5.0, 5.0 + PAUSE_S]


async def test_nothing_is_sent_after_the_limit() -> None:
    clock = FakeClock()
    loaded = await load(plan(*[None] * 9), Server(clock, 1.0), clock, num_streams=1, limit_s=2.5)
    assert (len(loaded.outcomes), loaded.num_cut, loaded.num_left) == (3, 0, 6)
    clock = FakeClock()
    loaded = await load(plan(0.0, 1.0, 2.0, 3.0), Server(clock, 1.0), clock, limit_s=1.5)
    assert (len(loaded.outcomes), loaded.num_left) == (2, 2)


async def test_what_ended_before_a_stop_is_kept() -> None:
    clock = FakeClock()
    loaded = await load(plan(*[None] * 9), Server(clock, 1.0), clock, num_streams=2, stop_at_s=2.5)
    assert [o.times_s for o in loaded.outcomes] == [[1.0], [2.0]]
    assert (loaded.num_cut, loaded.num_left) == (2, 5)
