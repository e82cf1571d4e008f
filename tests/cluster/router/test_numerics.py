"""Replicas that compute different last bits: where a stream with tokens may continue, how long it waits, and what is said about it."""

import asyncio
import logging
import time

import pytest
from support.fakes.replica import FakeReplica, tokens

from cluster.router.numerics import required_numerics
from cluster.router.router import Availability, Router, Trace
from workers.protocol import BATCH_PRIORITY, GenerateRequest, LoadReport, SamplingParams

OUTPUT = list(range(100, 132))
OLD, NEW = "float32-sdpa-tp1-0a", "float32-sdpa-tp1-0b"


@pytest.mark.parametrize(
    ("produced_by", "present", "expected", "waited_s", "required"),
    [
        (None, {NEW}, True, 0.0, None),  # no token yet: any replica will do
        (OLD, {OLD, NEW}, False, 0.0, OLD),
        (OLD, {NEW}, True, 0.0, OLD),  # the replica that is expected may have the same
        (OLD, {NEW, None}, False, 0.0, None),  # nothing to wait for
        (OLD, {OLD, NEW}, True, 2.9, OLD),
        (OLD, {OLD, NEW}, True, 3.0, None),
        ("", {NEW}, False, 0.0, None),  # a replica of an older version
        ("", {"", NEW}, False, 0.0, ""),
    ],
)
def test_the_choice(produced_by, present, expected, waited_s, required) -> None:
    found = required_numerics(produced_by, present, expected=expected, waited_s=waited_s, max_wait_s=3.0)
    assert found == required


def replica(name: str, numerics: str, **options) -> FakeReplica:
    made = FakeReplica(tokens(OUTPUT), replica_id=name, numerics=numerics, **options)
    made.load = LoadReport(num_blocks=100, forward_age_s=0.1)
    return made


def request(name: str = "r", *, priority: int = 0) -> GenerateRequest:
    sampling = SamplingParams(max_tokens=32, seed=7)
    return GenerateRequest(request_id=name, prompt_token_ids=[1, 2, 3], sampling=sampling, priority=priority)


async def collect(router: Router, req: GenerateRequest | None = None, trace: Trace | None = None) -> list[int]:
    return [i async for delta in router.generate(req or request(), trace=trace) for i in delta.token_ids]


async def until(condition) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.002)


@pytest.mark.parametrize("priority", [0, BATCH_PRIORITY], ids=["online", "batch line"])
@pytest.mark.parametrize("lost_after", [1, 13, 31])
async def test_a_stream_with_tokens_moves_to_the_replica_that_computes_the_same(lost_after: int, priority: int) -> None:
    first, same = replica("a", OLD, lose_after=lost_after), replica("c", OLD)
    others = [replica(name, NEW) for name in "bde"]
    same.load = LoadReport(num_blocks=100, num_used_blocks=90, num_running=5, num_pending_tokens=500, forward_age_s=0.1)
    router, trace = Router([first]), Trace()
    router.update([first, *others, same], Availability())
    first.load = LoadReport(num_blocks=100, forward_age_s=0.1)
    for other in others:
        other.say(num_running=6)  # the first request goes to the empty one
    assert await collect(router, request(priority=priority), trace) == OUTPUT
    assert (len(first.requests), len(same.requests)) == (1, 1)
    assert (trace.num_failovers, trace.num_numerics_changes, router.num_numerics_changes_total) == (1, 0, 0)


async def test_a_request_without_a_token_goes_anywhere() -> None:
    first, other = replica("a", OLD, lose_after=0), replica("b", NEW)
    router, trace = Router([first]), Trace()
    router.update([first, other], Availability(expected=True))
    other.say(num_running=5)
    assert await collect(router, trace=trace) == OUTPUT
    assert (len(first.requests), trace.num_failovers, trace.num_numerics_changes) == (1, 1, 0)


@pytest.mark.parametrize("priority", [0, BATCH_PRIORITY], ids=["online", "batch line"])
async def test_without_anything_to_wait_for_it_continues_at_once_and_says_so(priority: int, caplog) -> None:
    first, other = replica("a", OLD, lose_after=5), replica("b", NEW)
    router, trace = Router([first], numerics_wait_s=60.0), Trace()
    router.update([first, other], Availability())
    other.say(num_running=5)
    with caplog.at_level(logging.WARNING, logger="cluster.router"):
        assert await collect(router, request(priority=priority), trace) == OUTPUT
    assert (trace.num_failovers, trace.num_numerics_changes, router.num_numerics_changes_total) == (1, 1, 1)
    (said,) = [r.getMessage() for r in caplog.records if "other last bits" in r.getMessage()]
    assert "Request r continues after 5 tokens on replica b" in said and OLD in said and NEW in said


async def test_after_the_wait_it_continues_on_any_replica() -> None:
    first, other = replica("a", OLD, lose_after=5), replica("b", NEW)
    router, trace = Router([first], numerics_wait_s=0.2), Trace()
    router.update([first, other], Availability(expected=True))
    other.say(num_running=5)
    began = time.monotonic()
    assert await collect(router, trace=trace) == OUTPUT
    assert time.monotonic() - began >= 0.2
    assert trace.num_numerics_changes == 1


async def test_a_replica_of_its_kind_that_comes_in_time_gets_it() -> None:
    first, other, coming = replica("a", OLD, lose_after=5), replica("b", NEW), replica("c", OLD)
    router, trace = Router([first], numerics_wait_s=60.0), Trace()
    router.update([first, other], Availability(expected=True))
    other.say(num_running=5)
    running = asyncio.create_task(collect(router, trace=trace))
    await until(lambda: router.num_waiting)
    assert await collect(router, request("new")) == OUTPUT, "others do not wait for it"
    assert [r.request_id for r in other.requests] == ["new"]
    router.update([other, coming], Availability(expected=True))
    assert await running == OUTPUT
    assert (len(coming.requests), trace.num_numerics_changes) == (1, 0)


async def test_streams_that_wait_for_a_full_replica_keep_their_order_and_stop_nobody() -> None:
    first, other = replica("a", OLD, hold_after=5), replica("b", NEW)
    full = replica("c", OLD, hold_after=20, max_num_seqs=1)  # room for two sequences
    router = Router([full], numerics_wait_s=60.0)
    before = [asyncio.create_task(collect(router, request(f"f{i}"))) for i in range(2)]
    await until(lambda: full.num_open == 2)
    router.update([full, first], Availability())
    running = [asyncio.create_task(collect(router, request(f"r{i}"))) for i in range(3)]
    await until(lambda: first.num_open == 3)
    router.update([full, first, other], Availability())
    first.lose()
    await until(lambda: router.num_waiting == 3)
    assert await asyncio.gather(*(collect(router, request(f"n{i}")) for i in range(3))) == [OUTPUT] * 3
    assert {r.request_id for r in other.requests} == {"n0", "n1", "n2"}
    full.release.set()
    assert await asyncio.gather(*before, *running) == [OUTPUT] * 5
    assert [r.request_id for r in full.requests[2:]] == ["r0~2", "r1~2", "r2~2"]
    assert (router.num_numerics_changes_total, router.num_waiting, router.num_inflight_requests) == (0, 0, 0)


async def test_on_a_leaving_replica_streams_stay_until_the_deadline_rather_than_change() -> None:
    leaving, other = replica("a", OLD, hold_after=5), replica("b", NEW)
    router, trace = Router([leaving], numerics_wait_s=60.0), Trace()
    running = asyncio.create_task(collect(router, trace=trace))
    await leaving.holding.wait()
    leaving.is_leaving, leaving.drain_until = True, time.monotonic() + 0.2
    router.update([leaving, other], Availability())
    leaving.say()
    await asyncio.sleep(0.02)
    assert (leaving.num_open, router.num_waiting) == (1, 0)
    assert await running == OUTPUT
    assert (trace.num_failovers, trace.num_numerics_changes) == (1, 1), "at the deadline it moves, and says so"


async def test_on_a_leaving_replica_streams_move_at_once_to_the_same_numerics() -> None:
    leaving, same = replica("a", OLD, hold_after=5), replica("b", OLD)
    router, trace = Router([leaving]), Trace()
    running = asyncio.create_task(collect(router, trace=trace))
    await leaving.holding.wait()
    leaving.is_leaving, leaving.drain_until = True, time.monotonic() + 60
    router.update([leaving, same], Availability())
    assert await running == OUTPUT
    assert (trace.num_failovers, trace.num_numerics_changes) == (1, 0)


async def test_the_newest_token_decides() -> None:
    first, second = replica("a", OLD, lose_after=5), replica("b", NEW, hold_after=6)
    like_first, like_second = replica("c", OLD), replica("d", NEW)
    router, trace = Router([first]), Trace()
    router.update([first, second], Availability())
    second.say(num_running=5)
    running = asyncio.create_task(collect(router, trace=trace))
    await second.holding.wait()
    router.update([second, like_first, like_second], Availability())
    like_second.say(num_running=5)
    second.lose()
    assert await running == OUTPUT
    assert (len(like_first.requests), len(like_second.requests)) == (0, 1)
    assert (trace.num_failovers, trace.num_numerics_changes, router.num_numerics_changes_total) == (2, 1, 1)


async def test_health_and_explanation_show_the_numerics() -> None:
    router = Router([replica("a", OLD), replica("b", NEW)])
    assert [s.numerics for s in router.health().replicas] == [OLD, NEW]
    assert [r.numerics for r in (await router.explain([1, 2, 3])).replicas] == [OLD, NEW]
