"""Turns and shares: whoever floods the server delays itself."""

import asyncio

import pytest
from support.fakes.replica import FakeReplica, tokens

from cluster.router.admission import Turns
from cluster.router.router import Router
from workers.errors import OverloadedError
from workers.protocol import GenerateRequest, SamplingParams


def test_the_worked_example():
    turns = Turns()
    line = [("A", turns.take("A", 1)) for _ in range(4)] + [("B", turns.take("B", 1)) for _ in range(2)]
    assert [turn for _, turn in line] == [0, 1, 2, 3, 0, 1]
    assert [who for who, _ in sorted(line, key=lambda item: item[1])] == list("ABABAA")
    turns.came(2)
    assert turns.take("C", 1) == 2
    assert turns.take("B", 5) == 2 and turns.take("B", 1) == 7


def test_one_tenant_alone_is_served_in_order_of_arrival():
    turns, last = Turns(), -1.0
    for i in range(3000):
        turn = turns.take(None, 1 + i % 3)
        assert turn > last
        last = turn
        if i % 7 == 0:
            turns.came(turn)


def test_tenants_that_are_gone_are_forgotten():
    turns = Turns()
    for i in range(5000):
        turns.came(turns.take(f"t{i}", 1))
        turns.came(i + 1)
    assert len(turns._next) < 1100


def test_no_tenant_holds_all_the_room():
    router = Router([FakeReplica()], max_inflight_requests=8, max_queued_tokens=100)
    with router.admit(6, tenant="A"):
        with pytest.raises(OverloadedError, match="holds 6 of the at most 6"), router.admit(1, tenant="A"):
            pass
        with router.admit(1, tenant="B"), router.admit(1):
            pass
        with pytest.raises(OverloadedError, match="holds 6 of at most 8"), router.admit(3, tenant="B"):
            pass
    with router.admit(1, 70, tenant="A"):
        with pytest.raises(OverloadedError, match="70 prompt tokens of this API key"), router.admit(1, 10, tenant="A"):
            pass
        with router.admit(1, 25, tenant="B"):
            pass
    with router.admit(8, tenant="A"):  # what no queue could hold fits an empty one
        pass
    assert not router._bounds._held and not router._bounds._queued


async def test_a_polite_tenant_does_not_wait_behind_a_flood():
    replica = FakeReplica(tokens([42, 43]), max_num_seqs=1, hold_after=1)
    router = Router([replica])
    served: list[str] = []

    async def ask(name: str, number: int) -> None:
        request = GenerateRequest(
            request_id=f"{name}{number}", prompt_token_ids=[5, 6], sampling=SamplingParams(max_tokens=2, seed=0)
        )
        with router.admit(1, 2, tenant=name) as admission:
            assert [delta async for delta in router.generate(request, admission=admission)]
            served.append(request.request_id)

    flood = [asyncio.create_task(ask("flood", i)) for i in range(200)]
    await replica.holding.wait()
    polite = [asyncio.create_task(ask("polite", i)) for i in range(2)]
    while router.num_waiting + replica.num_open < 202:
        await asyncio.sleep(0)
    at_once = replica.num_open
    replica.release.set()
    await asyncio.gather(*flood, *polite)
    assert len(served) == 202
    placed = [request.request_id for request in replica.requests]
    assert placed.index("polite1") <= at_once + 4
    assert [name for name in placed if name.startswith("flood")] == [f"flood{i}" for i in range(200)]
