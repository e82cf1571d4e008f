"""The queue at the router: its order, deadlines and timeouts, and what remains after a client disconnects."""

import asyncio
import contextlib
import time

import pytest
from support.fakes.replica import FakeReplica, tokens

from cluster.router.admission.request_queue import MAX_STALE
from cluster.router.router import Availability, Router
from workers.errors import DeadlineExceededError, OverloadedError
from workers.protocol import GenerateRequest, LoadReport, SamplingParams


def request(name: str, priority: int = 0) -> GenerateRequest:
    sampling = SamplingParams(max_tokens=4, seed=0)
    return GenerateRequest(request_id=name, prompt_token_ids=[1, 2], sampling=sampling, priority=priority)


async def collect(router: Router, name: str, *, priority: int = 0, deadline: float | None = None) -> list[int]:
    with router.admit(1, 2, priority=priority, deadline=deadline) as admission:
        deltas = router.generate(request(name, priority), admission=admission)
        async with contextlib.aclosing(deltas):
            return [i async for delta in deltas for i in delta.token_ids]


def small(**options) -> FakeReplica:
    """Room for two sequences: one running and one to come next."""
    replica = FakeReplica(tokens([5, 6]), max_num_seqs=1, **options)
    replica.load = LoadReport()
    return replica


async def start(router: Router, *tasks) -> list[asyncio.Task]:
    started = []
    for task in tasks:
        before = router.num_inflight_requests
        started.append(asyncio.create_task(task))
        while router.num_inflight_requests == before:
            await asyncio.sleep(0)
        await asyncio.sleep(0)
    return started


async def test_priority_comes_first_then_arrival() -> None:
    replica = small(hold_after=0)
    router = Router([replica])
    names = [("running", 0), ("next", 0), ("late", 5), ("first", 0), ("second", 0), ("urgent", -1)]
    tasks = await start(router, *(collect(router, name, priority=p) for name, p in names))
    assert router.num_waiting == 4
    replica.release.set()
    await asyncio.gather(*tasks)
    assert [r.request_id for r in replica.requests] == ["running", "next", "urgent", "first", "second", "late"]


async def test_a_resumed_stream_keeps_its_position() -> None:
    lost, other = small(replica_id="a", hold_after=1), small(replica_id="b", hold_after=1)
    router = Router([lost])
    tasks = await start(router, *(collect(router, f"q{i}") for i in range(4)))
    assert router.num_waiting == 2
    router.update([lost], Availability(expected=True))
    lost.lose()
    while router.num_waiting < 4:
        await asyncio.sleep(0)
    router.update([other], Availability())
    other.release.set()
    assert await asyncio.gather(*tasks) == [[5, 6]] * 4
    names = [r.request_id.partition("~")[0] for r in other.requests]
    assert names == ["q0", "q1", "q2", "q3"], "a lost replica must not put a stream after later ones"


async def test_a_queued_request_that_is_cancelled_frees_its_room() -> None:
    replica = small(hold_after=0)
    router = Router([replica], max_inflight_requests=3)
    tasks = await start(router, *(collect(router, f"q{i}") for i in range(3)))
    assert (router.num_waiting, router.num_queued_tokens) == (1, 2)
    tasks[2].cancel()
    await asyncio.gather(tasks[2], return_exceptions=True)
    assert (router.num_waiting, router.num_queued_tokens, router.num_inflight_requests) == (0, 0, 2)
    tasks += await start(router, collect(router, "q3"))
    replica.release.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert [r.request_id for r in replica.requests] == ["q0", "q1", "q3"]


async def test_a_request_cancelled_at_the_moment_of_its_assignment_frees_its_room() -> None:
    replica = small(hold_after=0)
    router = Router([replica])
    tasks = await start(router, *(collect(router, f"q{i}") for i in range(4)))
    tasks[0].cancel()
    while router.num_waiting == 2:
        await asyncio.sleep(0)
    tasks[2].cancel()  # it is assigned, but its task has not run yet
    replica.release.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert results[1] == results[3] == [5, 6]
    assert router.report("g", "u").num_running == 0
    assert router.num_queued_tokens == 0


async def test_a_deadline_that_passes_in_the_queue() -> None:
    replica = small(hold_after=0)
    router = Router([replica])
    tasks = await start(router, collect(router, "q0"), collect(router, "q1"))
    with pytest.raises(DeadlineExceededError, match=r"not complete after the 0\.0\d* s it was given"):
        await collect(router, "hurried", deadline=time.monotonic() + 0.03)
    assert router.num_waiting == 0
    replica.release.set()
    await asyncio.gather(*tasks)
    assert len(replica.requests) == 2


async def test_a_deadline_that_passes_during_the_stream_aborts_it() -> None:
    replica = small(hold_after=1)
    router = Router([replica])
    seen = []
    with router.admit(1, 2, deadline=time.monotonic() + 0.05) as admission, pytest.raises(DeadlineExceededError):
        async for delta in router.generate(request("q"), admission=admission):
            seen += delta.token_ids
    assert seen == [5]
    assert replica.aborted == ["q"]
    assert router.report("g", "u").num_running == 0


async def test_a_deadline_that_is_met_has_no_effect() -> None:
    router = Router([small()])
    assert await collect(router, "q", deadline=time.monotonic() + 5) == [5, 6]


async def test_a_wait_longer_than_the_deadline_is_refused_at_once() -> None:
    replica = small()
    replica.load = LoadReport(num_pending_tokens=500, tokens_per_s=100.0)
    router = Router([replica])
    with pytest.raises(OverloadedError, match=r"about 5\.0 s, longer than the 2\.0 s") as error:
        await collect(router, "q", deadline=time.monotonic() + 2.0)
    assert error.value.retry_after_s == 5
    assert not replica.requests
    assert await collect(router, "q", deadline=time.monotonic() + 9.0) == [5, 6]


async def test_only_requests_that_are_not_overtaken_count_against_a_deadline() -> None:
    replica = small(hold_after=0)
    replica.load = LoadReport(tokens_per_s=10.0)
    router = Router([replica])
    tasks = await start(router, *(collect(router, f"q{i}", priority=5) for i in range(22)))
    assert router.num_waiting == 20, "40 tokens, 4 s"
    with pytest.raises(OverloadedError, match=r"about 4\.\d s, longer than the 2\.0 s"):
        await collect(router, "same", priority=5, deadline=time.monotonic() + 2.0)
    tasks += await start(router, collect(router, "urgent", deadline=time.monotonic() + 2.0))
    replica.release.set()
    assert await asyncio.gather(*tasks) == [[5, 6]] * 23


async def test_a_quiet_time_before_a_burst_does_not_lengthen_the_estimated_wait() -> None:
    """Two short answers in half a minute do not show what the replica could have done."""
    now = 1000.0
    replica = small()
    router = Router([replica], clock=lambda: now)
    for _ in range(2):
        assert await collect(router, "quiet") == [5, 6]
        now += 14.0
    replica.hold_after = 0
    tasks = await start(router, *(collect(router, f"q{i}") for i in range(22)))
    assert router.num_waiting == 20
    tasks += await start(router, collect(router, "patient", deadline=now + 30.0))
    replica.release.set()
    assert await asyncio.gather(*tasks) == [[5, 6]] * 23


async def test_the_wait_for_room_is_estimated_from_how_long_sequences_stay() -> None:
    now = 1000.0
    replica = small(hold_after=1)
    router = Router([replica], clock=lambda: now)
    tasks = await start(router, collect(router, "slow"))
    now += 8.0
    replica.release.set()
    await asyncio.gather(*tasks)
    replica.release.clear()
    tasks = await start(router, *(collect(router, f"q{i}") for i in range(5)))
    assert router.num_waiting == 3
    with pytest.raises(OverloadedError, match=r"about 12\.0 s, longer than the 10\.0 s"):
        await collect(router, "late", deadline=now + 10.0)  # 3 before it, room for 2, 8 s each
    replica.release.set()
    await asyncio.gather(*tasks)


async def test_requests_that_left_do_not_fill_the_memory() -> None:
    replica = small(hold_after=0)
    router = Router([replica])
    tasks = await start(router, *(collect(router, f"q{i}") for i in range(3)))
    for i in range(4 * MAX_STALE):
        (task,) = await start(router, collect(router, f"gone{i}", priority=1))
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert router.num_waiting == 1
    num_stale = router.num_stale
    assert num_stale <= MAX_STALE + 2, f"{num_stale} requests of disconnected clients are still held"
    replica.release.set()
    assert await asyncio.gather(*tasks) == [[5, 6]] * 3


async def test_time_alone_wakes_the_queue() -> None:
    """A replica may become ready without a frame, for example once its last forward pass is recent enough."""
    replica = small(reason="Away.")
    router = Router([replica])
    router.update([replica], Availability(expected=True))
    (task,) = await start(router, collect(router, "q"))
    assert router.num_waiting == 1
    replica.reason = None
    assert await asyncio.wait_for(task, 5) == [5, 6]
