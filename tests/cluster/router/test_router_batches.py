"""Batch lines at the router: they use the room that online requests leave, and never delay those."""

import asyncio
import time

import pytest
from support.fakes.replica import FakeReplica, tokens

from cluster.protocol.report import BatchDemand
from cluster.router.admission.admission import Admission
from cluster.router.router import Availability, Router
from workers.errors import CrashedError, EngineError, OverloadedError
from workers.protocol import BATCH_PRIORITY, GenerateRequest, LoadReport, SamplingParams

OUTPUT = list(range(100, 120))


def request(name: str, priority: int = 0) -> GenerateRequest:
    sampling = SamplingParams(max_tokens=64, seed=0)
    return GenerateRequest(request_id=name, prompt_token_ids=[1, 2], sampling=sampling, priority=priority)


async def collect(router: Router, name: str, priority: int = 0, *, max_crashes: int | None = None) -> list[int]:
    deltas = router.generate(request(name, priority), max_crashes=max_crashes)
    return [i async for delta in deltas for i in delta.token_ids]


def idle(replica_id: str = "r0", **options) -> FakeReplica:
    replica = FakeReplica(tokens([5, 6]), replica_id=replica_id, **options)
    replica.load = LoadReport(num_blocks=100, tokens_per_s=1000.0)
    return replica


async def start(router: Router, names: list[str], priority: int = 0) -> list[asyncio.Task]:
    tasks = []
    for name in names:
        before = router.num_inflight_requests
        tasks.append(asyncio.create_task(collect(router, name, priority)))
        while router.num_inflight_requests == before:
            await asyncio.sleep(0)
        await asyncio.sleep(0)
    return tasks


def names(replica: FakeReplica) -> list[str]:
    return [r.request_id for r in replica.requests]


async def test_online_requests_find_room_when_batch_lines_fill_everything() -> None:
    replica = idle(max_num_seqs=4, hold_after=0)
    router = Router([replica])
    lines = await start(router, [f"line{i}" for i in range(7)], BATCH_PRIORITY)
    assert (len(replica.requests), router.num_waiting) == (5, 2), "four running and one to come next"
    replica.say(num_running=4, num_waiting=1, num_background=5, num_pending_tokens=9, num_background_pending_tokens=9)
    online = await start(router, [f"online{i}" for i in range(6)])
    assert names(replica)[5:] == [f"online{i}" for i in range(5)], "online requests wait only for each other"
    assert router.num_waiting == 3
    replica.say(num_running=0, num_waiting=0, num_background=0, num_pending_tokens=0, num_background_pending_tokens=0)
    replica.release.set()
    assert await asyncio.wait_for(asyncio.gather(*lines, *online), 10) == [[5, 6]] * 13
    assert names(replica)[10] == "online5", "and go before batch lines that arrived earlier"


async def test_batch_lines_go_where_online_requests_leave_room() -> None:
    busy, free = idle("busy", max_num_seqs=4, hold_after=0), idle("free", max_num_seqs=4, hold_after=0)
    router = Router([busy, free])
    busy.say(num_running=5)  # online requests of another gateway
    lines = await start(router, [f"line{i}" for i in range(4)], BATCH_PRIORITY)
    assert (len(busy.requests), len(free.requests)) == (0, 4)
    for replica in (busy, free):
        replica.release.set()
    await asyncio.gather(*lines)


async def test_waiting_batch_lines_do_not_lengthen_the_wait_of_online_requests() -> None:
    replica = idle()
    replica.load = LoadReport(num_pending_tokens=9_000, num_background_pending_tokens=8_900, tokens_per_s=100.0)
    router = Router([replica])
    now = time.monotonic()
    with router.admit(1, 2, deadline=now + 2.0):
        pass
    with (
        pytest.raises(OverloadedError, match=r"about 90\.\d s"),
        router.admit(1, 2, priority=BATCH_PRIORITY, deadline=now + 2.0),
    ):
        pass


async def test_batch_lines_have_limits_of_their_own() -> None:
    router = Router([idle()], max_inflight_requests=2, max_queued_tokens=100)
    with router.admit(500, 100_000, priority=BATCH_PRIORITY), router.admit(2, 100):
        with pytest.raises(OverloadedError, match="holds 2 of at most 2"), router.admit(1, 1):
            pass
        with router.admit(500, 100_000, priority=BATCH_PRIORITY + 3):
            assert (router.num_inflight_requests, router.num_queued_tokens) == (1002, 200_100)
    assert (router.num_inflight_requests, router.num_queued_tokens) == (0, 0)


async def test_the_report_separates_batches() -> None:
    replica = idle(max_num_seqs=1, hold_after=0)
    router = Router([replica])
    lines = await start(router, ["line0", "line1", "line2"], BATCH_PRIORITY)
    demand = BatchDemand(batch_id="b", remaining_tokens=700, deadline_s=60.0, max_replicas=3)
    router.batches, router.batch_tokens_total = (demand,), 300
    report = router.report("g", "u")
    assert (report.num_running, report.streams_per_replica) == (2, {"r0": 2})
    assert (report.num_queued, report.num_queued_tokens, report.oldest_wait_s, report.arrived_tokens_total) == (0,) * 4
    assert (report.batches, report.batch_tokens_total) == ((demand,), 300)
    replica.release.set()
    await asyncio.gather(*lines)
    assert router.report("g", "u").ttft_p95_s is None, "batch lines do not count in the time to first token"


async def test_batch_room_is_what_online_requests_leave() -> None:
    replicas = [idle("r0", max_num_seqs=8, hold_after=0), idle("r1", max_num_seqs=4), idle("r2", reason="Away.")]
    router = Router()
    assert router.batch_room() == 0
    router.update(replicas, Availability())
    assert router.batch_room() == 10 + 5, "on each ready replica, a quarter more than it can run"
    replicas[1].say(num_running=3, num_background=1)  # of another gateway
    assert router.batch_room() == 10 + 2
    replicas[1].say(num_running=9)
    assert router.batch_room() == 10
    running = [*await start(router, ["a", "b"]), *await start(router, ["c", "d", "e"], BATCH_PRIORITY)]
    assert router.batch_room() == 5
    running += await start(router, [f"line{i}" for i in range(7)], BATCH_PRIORITY)
    assert (router.num_waiting, router.batch_room()) == (2, 0)
    replicas[1].say(num_running=0)
    assert router.batch_room() == 3, "the queued lines have gone there"
    replicas[0].drain_until = time.monotonic() + 60
    replicas[0].say()
    assert router.batch_room() == 3
    replicas[0].release.set()
    await asyncio.gather(*running)
    assert router.batch_room() == 5


@pytest.mark.parametrize("max_crashes", [1, 2, 3])
async def test_max_crashes_counts_all_crashes(max_crashes, monkeypatch) -> None:
    replicas = [FakeReplica(tokens(OUTPUT), replica_id=f"r{i}", lose_after=2) for i in range(8)]
    router = Router(replicas, policy="round_robin")
    with pytest.raises(CrashedError, match=r"crashed .* while it worked on this request.*Replica r\d is lost") as error:
        await collect(router, "line", BATCH_PRIORITY, max_crashes=max_crashes)
    assert error.value.num_crashes == max_crashes
    assert isinstance(error.value, EngineError)
    assert sum(len(r.requests) for r in replicas) == max_crashes
    assert (router.num_inflight_requests, router.num_queued_tokens, router.num_waiting) == (0, 0, 0)


@pytest.mark.parametrize(
    ("num_lines", "num_reported", "alone"), [(1, 0, True), (2, 0, False), (1, 3, False)], ids=["alone", "two", "others"]
)
async def test_a_crash_reports_whether_the_request_was_alone(num_lines, num_reported, alone) -> None:
    """num_reported: sequences in the replica's last report; any beyond ours belong to other gateways."""
    replica = FakeReplica(tokens(OUTPUT), hold_after=1)
    replica.load = LoadReport(num_blocks=100, tokens_per_s=1000.0)
    router = Router([replica])
    names = [f"line-{i}" for i in range(num_lines)]
    tasks = [asyncio.create_task(collect(router, name, BATCH_PRIORITY, max_crashes=1)) for name in names]
    while replica.num_open < num_lines:
        await asyncio.sleep(0)
    await replica.holding.wait()
    replica.say(num_running=num_reported)
    replica.lose()
    errors = await asyncio.gather(*tasks, return_exceptions=True)
    assert [(type(e), e.alone) for e in errors] == [(CrashedError, alone)] * num_lines


async def test_the_sequences_of_one_request_count_as_alone() -> None:
    replica = FakeReplica(tokens(OUTPUT), hold_after=1)
    replica.load = LoadReport(num_blocks=100, tokens_per_s=1000.0)
    router = Router([replica])

    async def run(name: str, admission: Admission) -> None:
        async for _ in router.generate(request(name, BATCH_PRIORITY), admission=admission, max_crashes=1):
            pass

    with router.admit(2, 4, priority=BATCH_PRIORITY) as admission:
        tasks = [asyncio.create_task(run(f"line-{i}", admission)) for i in range(2)]
        while replica.num_open < 2:
            await asyncio.sleep(0)
        await replica.holding.wait()
        replica.say(num_running=2)
        replica.lose()
        errors = await asyncio.gather(*tasks, return_exceptions=True)
    assert [(type(e), e.alone) for e in errors] == [(CrashedError, True)] * 2


async def test_losses_other_than_crashes_do_not_count() -> None:
    replicas = [FakeReplica(tokens(OUTPUT), replica_id=f"r{i}", lose_after=2) for i in range(8)]
    for replica in replicas:
        replica.crashes = False
    last = FakeReplica(tokens(OUTPUT), replica_id="last")
    router = Router([*replicas, last], policy="round_robin")
    assert await collect(router, "line", BATCH_PRIORITY, max_crashes=1) == OUTPUT
