"""Streams that outlive their replicas: clients get what one undisturbed replica would have sent."""

import asyncio
import contextlib
import time

import msgspec
import pytest
from support.fakes.replica import FakeReplica, tokens

import cluster.router.stream
from cluster.router.router import Availability, Router, Trace
from workers.errors import DeadlineExceededError, EngineError, OverloadedError, ReplicaUnavailableError
from workers.protocol import FinishReason, GenerateRequest, LoadReport, SamplingParams, TokenDelta

OUTPUT = list(range(100, 164))


def request(name: str = "r", *, logprobs: int | None = None) -> GenerateRequest:
    sampling = SamplingParams(max_tokens=64, seed=7, logprobs=logprobs, min_tokens=3)
    return GenerateRequest(request_id=name, prompt_token_ids=[1, 2, 3], sampling=sampling, priority=2)


async def collect(router: Router, req: GenerateRequest | None = None, trace: Trace | None = None) -> list[TokenDelta]:
    return [delta async for delta in router.generate(req or request(), trace=trace)]


async def until(condition) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0)


@pytest.mark.parametrize("lost_after", range(64))
async def test_a_replica_lost_anywhere_changes_no_delta(lost_after: int) -> None:
    whole = await collect(Router([FakeReplica(tokens(OUTPUT))]), request(logprobs=2))
    first = FakeReplica(tokens(OUTPUT), replica_id="a", lose_after=lost_after)
    second = FakeReplica(tokens(OUTPUT), replica_id="b")
    router, trace = Router([first], policy="round_robin"), Trace()
    router.update([first, second], Availability())
    assert await collect(router, request(logprobs=2), trace) == whole
    assert len(first.requests) == 1, "the replica to be lost must get the request first"
    (resumed,) = second.requests
    assert resumed.output_token_ids == OUTPUT[:lost_after]
    assert msgspec.structs.replace(resumed, request_id="r", output_token_ids=[]) == request(logprobs=2)
    assert (trace.replica_id, trace.num_failovers, router.num_failovers_total) == ("b", 1, 1)
    assert (router.num_inflight_requests, router.num_queued_tokens, router.num_waiting) == (0, 0, 0)
    assert first.num_open == second.num_open == 0


async def test_what_is_taken_on_the_way_counts_as_output_and_first_and_last_deltas_are_not_offered() -> None:
    first = FakeReplica(tokens(OUTPUT), replica_id="a", lose_after=40)
    second = FakeReplica(tokens(OUTPUT), replica_id="b")
    taken: list[int] = []

    def take(delta: TokenDelta) -> bool:
        taken.extend(delta.token_ids)
        return True

    router = Router([first], policy="round_robin")
    router.update([first, second], Availability())
    yielded = [i async for delta in router.generate(request(), take=take) for i in delta.token_ids]
    assert yielded == [OUTPUT[0], OUTPUT[40], OUTPUT[-1]]
    assert sorted(yielded + taken) == OUTPUT
    assert second.requests[0].output_token_ids == OUTPUT[:40]


async def test_repeated_losses_with_progress_in_between() -> None:
    replicas = [FakeReplica(tokens(OUTPUT), replica_id=f"r{i}", lose_after=4) for i in range(15)]
    last = FakeReplica(tokens(OUTPUT), replica_id="last")
    deltas = await collect(Router([*replicas, last], policy="round_robin"))
    assert [i for d in deltas for i in d.token_ids] == OUTPUT
    assert [d.num_cached_tokens for d in deltas] == [1] + [None] * 63, "cached tokens are reported once"
    assert {d.request_id for d in deltas} == {"r"}
    ids = [r.request_id for replica in [*replicas, last] for r in replica.requests]
    assert len(set(ids)) == len(ids), "a late delta of an earlier attempt must not match a later one"


async def test_a_request_that_crashes_five_replicas_gets_no_sixth(monkeypatch) -> None:
    monkeypatch.setattr(cluster.router.stream, "FIRST_PAUSE_S", 1e-3)
    replicas = [FakeReplica(tokens(OUTPUT), replica_id=f"r{i}", lose_after=0) for i in range(7)]
    router = Router(replicas, policy="round_robin")
    with pytest.raises(EngineError, match=r"5 replicas in a row .* Replica r\d is lost"):
        await collect(router)
    assert sorted(len(r.requests) for r in replicas) == [0, 0, 1, 1, 1, 1, 1]
    assert (router.num_inflight_requests, router.num_queued_tokens, router.num_waiting) == (0, 0, 0)


async def test_replicas_that_are_cut_off_or_frozen_do_not_incriminate_the_request(monkeypatch) -> None:
    monkeypatch.setattr(cluster.router.stream, "FIRST_PAUSE_S", 1e-6)
    replicas = [FakeReplica(tokens(OUTPUT), replica_id=f"r{i}", lose_after=0) for i in range(19)]
    for replica in replicas:
        replica.crashes = False
    last = FakeReplica(tokens(OUTPUT), replica_id="last")
    deltas = await collect(Router([*replicas, last], policy="round_robin"))
    assert [i for d in deltas for i in d.token_ids] == OUTPUT


async def test_other_losses_have_a_limit_too(monkeypatch) -> None:
    monkeypatch.setattr(cluster.router.stream, "FIRST_PAUSE_S", 1e-6)
    replicas = [FakeReplica(tokens(OUTPUT), replica_id=f"r{i}", lose_after=0) for i in range(25)]
    for replica in replicas:
        replica.crashes = False
    with pytest.raises(EngineError, match="20 replicas in a row"):
        await collect(Router(replicas, policy="round_robin"))


async def test_a_deadline_ends_the_pause_between_two_attempts(monkeypatch) -> None:
    monkeypatch.setattr(cluster.router.stream, "FIRST_PAUSE_S", 60.0)
    monkeypatch.setattr(cluster.router.stream, "MAX_PAUSE_S", 60.0)
    replicas = [FakeReplica(tokens(OUTPUT), replica_id=f"r{i}", lose_after=0) for i in range(3)]
    router = Router(replicas, policy="round_robin")
    with router.admit(1, 3, deadline=time.monotonic() + 0.1) as admission, pytest.raises(DeadlineExceededError):
        async for _ in router.generate(request(), admission=admission):
            pass
    assert sum(len(r.requests) for r in replicas) == 2, "two losses in a row: the third attempt has to wait"
    assert (router.num_inflight_requests, router.num_queued_tokens, router.num_waiting) == (0, 0, 0)


async def test_a_stream_that_ends_without_a_reason_is_resumed_on_another_replica() -> None:
    class Forgetful(FakeReplica):
        async def generate(self, req, *, take=None):
            self.requests.append(req)
            yield tokens(OUTPUT)(req)[0]

    forgetful, good = Forgetful(replica_id="a"), FakeReplica(tokens(OUTPUT), replica_id="b")
    deltas = await collect(Router([forgetful, good], policy="round_robin"))
    assert [i for d in deltas for i in d.token_ids] == OUTPUT
    assert len(forgetful.requests) == 1, "it is still ready, but others are tried first"


async def test_what_one_replica_alone_cannot_do_goes_to_another() -> None:
    """It lacks an adapter: the others have it."""

    def lacks(req: GenerateRequest) -> list[TokenDelta | Exception]:
        error = "The adapter 'a@1' is not loaded on this replica."
        return [TokenDelta(request_id=req.request_id, finish_reason=FinishReason.ERROR, error=error, elsewhere=True)]

    lacking, good = FakeReplica(lacks, replica_id="a"), FakeReplica(tokens(OUTPUT), replica_id="b")
    deltas = await collect(Router([lacking, good], policy="round_robin"))
    assert [i for d in deltas for i in d.token_ids] == OUTPUT
    assert len(lacking.requests) == 1 and len(good.requests) == 1


async def test_what_no_replica_can_do_ends(monkeypatch) -> None:
    monkeypatch.setattr(cluster.router.stream, "FIRST_PAUSE_S", 1e-6)

    def lacks(req: GenerateRequest) -> list[TokenDelta | Exception]:
        return [TokenDelta(request_id=req.request_id, finish_reason=FinishReason.ERROR, error="No.", elsewhere=True)]

    with pytest.raises(EngineError, match=r"20 replicas in a row .* Replica a: No\."):
        await collect(Router([FakeReplica(lacks, replica_id="a")]))


async def test_an_error_other_than_a_lost_replica_is_not_retried() -> None:
    bad = FakeReplica(lambda r: [ZeroDivisionError("a bug")], replica_id="a")
    other = FakeReplica(replica_id="b")
    with pytest.raises(ZeroDivisionError):
        await collect(Router([bad, other], policy="round_robin"))
    assert not other.requests


# Waiting for a replica


async def test_a_stream_waits_for_a_replica_that_is_expected() -> None:
    lost, coming = (
        FakeReplica(tokens(OUTPUT), replica_id="a", lose_after=5),
        FakeReplica(tokens(OUTPUT), replica_id="b"),
    )
    router = Router([lost])
    router.update([lost], Availability(expected=True, reason="Replica b is loading."))
    running = asyncio.create_task(collect(router))
    await until(lambda: router.num_waiting)
    assert router.health().reason == "Replica b is loading."
    report = router.report("g", "http://g")
    assert (report.num_running, report.num_queued, report.num_queued_tokens) == (0, 1, 3)
    router.update([coming], Availability())
    assert [i for d in await running for i in d.token_ids] == OUTPUT


async def test_a_stream_waits_for_a_replica_that_may_recover() -> None:
    lost = FakeReplica(tokens(OUTPUT), replica_id="a", lose_after=5)
    paused = FakeReplica(
        tokens(OUTPUT), replica_id="b", reason="Replica b is waiting for rank 1, which does not answer."
    )
    router = Router([lost, paused])
    running = asyncio.create_task(collect(router))
    await until(lambda: router.num_waiting)
    paused.reason = None
    paused.say()
    assert [i for d in await running for i in d.token_ids] == OUTPUT


async def test_a_stream_ends_at_once_if_no_replica_is_expected() -> None:
    router = Router([FakeReplica(tokens(OUTPUT), lose_after=5)])
    seen = []
    with pytest.raises(ReplicaUnavailableError, match="Replica fake-0 is lost"):
        async for delta in router.generate(request()):
            seen += delta.token_ids
    assert seen == OUTPUT[:5]
    assert router.num_inflight_requests == router.num_queued_tokens == 0


async def test_the_wait_ends_when_no_replica_is_expected_any_more() -> None:
    router = Router()
    router.update([], Availability(expected=True))
    running = asyncio.create_task(collect(router))
    await until(lambda: router.num_waiting)
    router.update([], Availability(reason="The weights are damaged."))
    with pytest.raises(ReplicaUnavailableError, match="The weights are damaged"):
        await running


async def test_the_wait_has_a_limit() -> None:
    router = Router(queue_timeout_s=0.05)
    router.update([], Availability(expected=True, reason="Replica r0 waits for free resources."))
    with pytest.raises(
        ReplicaUnavailableError, match=r"Replica r0 waits for free resources\. The request waited 0.05 s"
    ):
        await collect(router)
    full = FakeReplica(tokens(OUTPUT), max_num_seqs=1, hold_after=0)
    full.load = LoadReport()
    router = Router([full], queue_timeout_s=0.05)
    others = [asyncio.create_task(collect(router, request(f"o{i}"))) for i in range(2)]
    await until(lambda: len(full.requests) == 2)
    with pytest.raises(OverloadedError, match="No replica had room"):
        await collect(router)
    full.release.set()
    await asyncio.gather(*others)


async def test_a_replica_that_is_not_ready_keeps_its_streams() -> None:
    silent, other = FakeReplica(tokens(OUTPUT), replica_id="a", hold_after=5), FakeReplica(replica_id="b")
    router = Router([silent, other], policy="round_robin")
    running = asyncio.create_task(collect(router))
    await silent.holding.wait()
    silent.reason = "Replica a made its last forward pass on all ranks 4.0 s ago."
    silent.say()
    await asyncio.sleep(0.05)
    assert not other.requests
    silent.release.set()
    assert len(await running) == 64


# Draining


async def test_a_draining_replica_gets_no_requests_and_its_streams_move_at_the_deadline() -> None:
    draining = FakeReplica(tokens(OUTPUT), replica_id="a", hold_after=5)
    router = Router([draining])
    running = asyncio.create_task(collect(router))
    await draining.holding.wait()
    other = FakeReplica(tokens(OUTPUT), replica_id="b")
    draining.drain_until = time.monotonic() + 0.1
    router.update([draining, other], Availability())
    assert [s.state for s in router.health().replicas] == ["draining", "ready"]
    await collect(router, request("new"))
    assert len(draining.requests) == 1, "a draining replica gets no new request"
    assert draining.num_open == 1, "until the deadline running streams continue"
    deltas = await running
    assert [i for d in deltas for i in d.token_ids] == OUTPUT
    assert draining.aborted == ["r"]
    assert other.requests[-1].output_token_ids == OUTPUT[:5]
    assert router.num_failovers_total == 1


async def test_a_stream_that_ends_before_the_drain_does_not_move() -> None:
    draining, other = FakeReplica(tokens(OUTPUT), replica_id="a", hold_after=5), FakeReplica(replica_id="b")
    router = Router([draining])
    running = asyncio.create_task(collect(router))
    await draining.holding.wait()
    draining.drain_until = time.monotonic() + 60
    router.update([draining, other], Availability())
    draining.release.set()
    assert len(await running) == 64
    assert not other.requests
    assert router.num_failovers_total == 0


async def test_a_drain_that_is_cancelled_and_one_that_is_due() -> None:
    draining, other = (
        FakeReplica(tokens(OUTPUT), replica_id="a", hold_after=5),
        FakeReplica(tokens(OUTPUT), replica_id="b"),
    )
    router = Router([draining])
    running = asyncio.create_task(collect(router))
    await draining.holding.wait()
    draining.drain_until = time.monotonic() + 0.02
    router.update([draining, other], Availability())
    draining.drain_until = None
    router.update([draining, other], Availability())
    await asyncio.sleep(0.05)
    assert draining.num_open == 1, "after a cancelled drain the stream stays"
    draining.drain_until = time.monotonic()
    draining.say()
    assert len(await running) == 64
    assert draining.aborted == ["r"]


async def test_without_another_replica_a_stream_stays_on_the_draining_one() -> None:
    draining = FakeReplica(tokens(OUTPUT), hold_after=5)
    router = Router([draining])
    running = asyncio.create_task(collect(router))
    await draining.holding.wait()
    draining.drain_until = time.monotonic()
    router.update([draining], Availability())
    await asyncio.sleep(0.02)
    draining.release.set()
    assert len(await running) == 64
    assert not draining.aborted


async def test_cancelling_a_stream_that_moves_leaves_nothing() -> None:
    lost = FakeReplica(tokens(OUTPUT), lose_after=5)
    router = Router([lost])
    router.update([lost], Availability(expected=True))
    running = asyncio.create_task(collect(router))
    await until(lambda: router.num_waiting)
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running
    assert (router.num_waiting, router.num_inflight_requests, router.num_queued_tokens) == (0, 0, 0)
    coming = FakeReplica(tokens(OUTPUT))
    router.update([coming], Availability())
    await asyncio.sleep(0)
    assert not coming.requests


async def test_a_cancellation_wins_over_a_move() -> None:
    draining, other = FakeReplica(tokens(OUTPUT), replica_id="a", hold_after=5), FakeReplica(replica_id="b")
    router = Router([draining])
    running = asyncio.create_task(collect(router))
    await draining.holding.wait()
    draining.drain_until = time.monotonic()
    running.cancel()
    router.update([draining, other], Availability())
    with pytest.raises(asyncio.CancelledError):
        await running
    assert not other.requests
    assert (draining.num_open, router.num_inflight_requests) == (0, 0)
