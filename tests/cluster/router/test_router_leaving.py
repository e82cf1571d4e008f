"""A replica on a preempted node: its streams move as others have room, it serves while no other can, and a gateway shuts down in order."""

import asyncio
import time

import pytest
from support.fakes.replica import FakeReplica, tokens

from cluster.router.router import Availability, Router
from workers.errors import ReplicaUnavailableError
from workers.protocol import BATCH_PRIORITY, GenerateRequest, LoadReport, SamplingParams

OUTPUT = list(range(100, 132))


def request(name: str, *, priority: int = 0) -> GenerateRequest:
    sampling = SamplingParams(max_tokens=32, seed=7)
    return GenerateRequest(request_id=name, prompt_token_ids=[1, 2, 3], sampling=sampling, priority=priority)


def replica(name: str, **options) -> FakeReplica:
    made = FakeReplica(tokens(OUTPUT), replica_id=name, **options)
    made.load = LoadReport(num_blocks=100, forward_age_s=0.1)
    return made


async def collect(router: Router, req: GenerateRequest) -> list[int]:
    return [i async for delta in router.generate(req) for i in delta.token_ids]


async def until(condition) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.002)


def leave(leaving: FakeReplica, *, left_s: float = 60.0) -> None:
    leaving.is_leaving, leaving.drain_until = True, time.monotonic() + left_s


async def test_streams_move_as_room_appears_and_the_others_continue() -> None:
    leaving, small = replica("a", hold_after=5), replica("b", hold_after=20, max_num_seqs=1)  # room for two sequences
    router = Router([leaving])
    running = [asyncio.create_task(collect(router, request(f"r{i}"))) for i in range(3)]
    await until(lambda: leaving.num_open == 3)
    leave(leaving)
    router.update([leaving, small], Availability())
    await until(lambda: small.num_open == 2)
    leaving.say()
    await asyncio.sleep(0.02)
    assert (leaving.num_open, router.num_waiting) == (1, 0), "a stream was moved although there is no room for it"
    small.release.set()
    await until(lambda: small.num_open == 0)
    leaving.say()
    assert await asyncio.gather(*running) == [OUTPUT] * 3
    assert len(small.requests) == 3
    assert router.num_failovers_total == 3


async def test_without_room_elsewhere_streams_move_at_the_deadline() -> None:
    leaving, full = replica("a", hold_after=5), replica("b", hold_after=20, max_num_seqs=1)
    router = Router([full])
    before = [asyncio.create_task(collect(router, request(f"f{i}"))) for i in range(2)]
    await until(lambda: full.num_open == 2)
    router.update([full, leaving], Availability())
    running = asyncio.create_task(collect(router, request("r")))
    await until(lambda: leaving.num_open == 1)
    leave(leaving, left_s=0.1)
    router.update([full, leaving], Availability())
    assert leaving.num_open == 1
    await until(lambda: router.num_waiting == 1)
    full.release.set()
    assert await asyncio.gather(running, *before) == [OUTPUT] * 3


async def test_a_leaving_replica_serves_until_another_can() -> None:
    leaving = replica("a")
    router = Router([leaving])
    leave(leaving)
    router.update([leaving], Availability(expected=True))
    assert router.health().ready, "a request sent now is served"
    assert router.health().replicas[0].state == "draining"
    assert await collect(router, request("first")) == OUTPUT
    other = replica("b")
    router.update([leaving, other], Availability())
    assert await collect(router, request("second")) == OUTPUT
    assert [r.request_id for r in other.requests] == ["second"]
    other.reason = "Replica b is stuck."
    assert await collect(router, request("third")) == OUTPUT
    assert [r.request_id for r in leaving.requests] == ["first", "third"]


async def test_after_its_deadline_a_leaving_replica_accepts_nothing() -> None:
    leaving = replica("a")
    router = Router([leaving])
    leave(leaving, left_s=0.0)
    router.update([leaving], Availability())
    assert not router.health().ready
    with pytest.raises(ReplicaUnavailableError):
        await collect(router, request("late"))


async def test_a_replica_drained_by_hand_accepts_nothing() -> None:
    draining = replica("a")
    router = Router([draining])
    draining.drain_until = time.monotonic() + 60
    router.update([draining], Availability())
    with pytest.raises(ReplicaUnavailableError):
        await collect(router, request("new"))


async def test_a_closing_router_is_not_ready_and_admits_only_if_told_to() -> None:
    router = Router([replica("a")])
    router.close("This server shuts down.", admits=True)
    assert (router.health().ready, router.health().reason) == (False, "This server shuts down.")
    assert await collect(router, request("served")) == OUTPUT
    router.close("This server shuts down.")
    with pytest.raises(ReplicaUnavailableError, match="shuts down"):
        await collect(router, request("refused"))
    router.reopen()
    assert router.health().ready
    assert await collect(router, request("served again")) == OUTPUT


async def test_end_streams_ends_running_and_queued_streams() -> None:
    held = replica("a", hold_after=5, max_num_seqs=1)
    router = Router([held])
    running = [asyncio.create_task(collect(router, request(f"r{i}"))) for i in range(3)]
    line = asyncio.create_task(collect(router, request("line", priority=BATCH_PRIORITY)))
    await until(lambda: held.num_open == 2 and router.num_waiting == 2)
    assert router.end_streams(RuntimeError("over")) == 3
    results = await asyncio.gather(*running, return_exceptions=True)
    assert [str(e) for e in results] == ["over"] * 3
    held.release.set()
    assert await line == OUTPUT, "batch lines continue: their runner would only repeat them"
    assert (router.num_inflight_requests, router.num_waiting) == (0, 0)


async def test_health_is_always_current() -> None:
    """Between two frames too, and for a leaving replica as well."""
    serving = replica("a")
    router = Router([serving])
    serving.reason = "Replica a is stuck."
    assert (router.health().ready, router.health().reason) == (False, "Replica a is stuck.")
    serving.reason = None
    leave(serving)
    assert router.health().ready
    serving.reason = "Replica a is stuck."
    assert not router.health().ready
