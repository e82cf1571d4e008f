"""The router: choice, admission, accounting, and what happens when a replica is not there."""

import asyncio
import contextlib

import pytest
from fake_replica import FakeReplica, tokens

from cluster.router.policy import Candidate, choose
from cluster.router.router import Router
from workers.errors import OverloadedError, ReplicaUnavailableError
from workers.protocol import GenerateRequest, LoadReport, SamplingParams, TokenDelta


def request(name: str = "r") -> GenerateRequest:
    return GenerateRequest(request_id=name, prompt_token_ids=[1], sampling=SamplingParams(max_tokens=4, seed=0))


async def collect(router: Router, name: str = "r") -> list[int]:
    return [i async for delta in router.generate(request(name)) for i in delta.token_ids]


@pytest.mark.parametrize(
    ("rows", "chosen"),
    [
        ([], None),
        ([(0, 0, 0.0), (0, 0, 0.0)], 0),
        ([(2, 1, 0.0), (1, 1, 0.9)], 1),  # fewer requests
        ([(1, 5, 0.0), (2, 2, 0.0)], 1),  # another gateway's requests count
        ([(1, 1, 0.9), (1, 1, 0.1)], 1),  # then less KV in use
    ],
)
def test_choose(rows: list[tuple[int, int, float]], chosen: int | None) -> None:
    picked = choose([Candidate(i, *row) for i, row in enumerate(rows)])
    assert (picked.index if picked else None) == chosen


async def test_requests_spread_over_ready_replicas() -> None:
    idle = LoadReport(num_blocks=10)
    replicas = [FakeReplica(tokens([5, 6]), replica_id=f"r{i}", hold_after=1) for i in range(3)]
    for replica in replicas:
        replica.load = idle
    replicas[1].reason = "Replica r1 is waiting for rank 0, which does not answer."
    router = Router(replicas)
    running = [asyncio.create_task(collect(router, f"q{i}")) for i in range(4)]
    for replica in (replicas[0], replicas[2]):
        await replica.holding.wait()
    while len(replicas[0].requests) + len(replicas[2].requests) < 4:
        await asyncio.sleep(0)
    assert [len(r.requests) for r in replicas] == [2, 0, 2]
    assert router.num_inflight_requests == 4
    for replica in replicas:
        replica.release.set()
    assert await asyncio.gather(*running) == [[5, 6]] * 4
    assert router.num_inflight_requests == 0


async def test_no_ready_replica_is_a_reason() -> None:
    router = Router([FakeReplica(reason="Replica a is gone."), FakeReplica(reason="Replica b is gone.")])
    with pytest.raises(ReplicaUnavailableError, match=r"Replica a is gone\. Replica b is gone\."):
        await collect(router)
    with pytest.raises(ReplicaUnavailableError, match="has no replica"):
        await collect(Router([]))
    assert router.num_inflight_requests == 0


async def test_admission_is_all_or_nothing() -> None:
    router = Router([FakeReplica()], max_inflight_requests=3)
    with router.admit(2):
        with pytest.raises(OverloadedError, match="holds 2 of at most 3") as error, router.admit(2):
            raise AssertionError("there is room for one only")
        assert error.value.retry_after_s > 0
        assert router.num_inflight_requests == 2
        assert await collect(router), "one more fits, and generate admits itself"
        with router.admit(1), pytest.raises(OverloadedError):
            await collect(router)
    assert router.num_inflight_requests == 0


async def test_closing_the_stream_aborts_and_accounts() -> None:
    replica = FakeReplica(tokens([5, 6, 7]))
    router = Router([replica])
    async with contextlib.aclosing(router.generate(request())) as deltas:
        assert (await anext(deltas)).token_ids == [5]
        assert (replica.num_open, router.num_inflight_requests) == (1, 1)
    assert (replica.num_open, router.num_inflight_requests) == (0, 0)
    assert replica.aborted == ["r"]


async def test_a_replica_lost_before_the_first_token_is_replaced() -> None:
    lost, other = FakeReplica(lambda r: [], replica_id="a"), FakeReplica(tokens([8, 9]), replica_id="b")
    assert await collect(Router([lost, other])) == [8, 9]
    assert (len(lost.requests), len(other.requests)) == (1, 1)


async def test_a_replica_lost_later_ends_the_stream_once() -> None:
    lost = FakeReplica(lambda r: [TokenDelta(request_id=r.request_id, token_ids=[5])], replica_id="a")
    other = FakeReplica(replica_id="b")
    seen: list[int] = []
    with pytest.raises(ReplicaUnavailableError, match="Replica a is gone"):
        async for delta in Router([lost, other]).generate(request()):
            seen += delta.token_ids
    assert seen == [5]
    assert not other.requests, "nothing is said twice"


async def test_every_replica_tried_and_lost() -> None:
    replicas = [FakeReplica(lambda r: [], replica_id=name) for name in "ab"]
    with pytest.raises(ReplicaUnavailableError, match="Replica b is gone"):
        await collect(Router(replicas))
    assert [len(r.requests) for r in replicas] == [1, 1]


async def test_draining_admits_nothing_and_lets_what_runs_end() -> None:
    replica = FakeReplica(tokens([5, 6]), hold_after=1)
    router = Router([replica])
    running = asyncio.create_task(collect(router))
    await replica.holding.wait()
    router.start_draining()
    assert not router.health().ready
    with pytest.raises(ReplicaUnavailableError, match="shutting down"):
        await collect(router, "late")
    replica.release.set()
    assert await running == [5, 6]
