"""Turns and shares: a tenant that floods the server delays only itself."""

import asyncio

import pytest
from support.fakes.replica import FakeReplica, tokens

from cluster.router.admission.admission import Turns
from cluster.router.router import Router
from workers.errors import OverloadedError
from workers.protocol import GenerateRequest, SamplingParams


def test_the_worked_example():
    turns = Turns()
    queue = [("A", turns.next_turn("A", 1)) for _ in range(4)] + [("B", turns.next_turn("B", 1)) for _ in range(2)]
    assert [turn for _, turn in queue] == [0, 1, 2, 3, 0, 1]
    assert [tenant for tenant, _ in sorted(queue, key=lambda item: item[1])] == list("ABABAA")
    turns.advance(2)
    assert turns.next_turn("C", 1) == 2
    assert turns.next_turn("B", 5) == 2 and turns.next_turn("B", 1) == 7


def test_one_tenant_alone_is_served_in_order_of_arrival():
    turns, last = Turns(), -1.0
    for i in range(3000):
        turn = turns.next_turn(None, 1 + i % 3)
        assert turn > last
        last = turn
        if i % 7 == 0:
            turns.advance(turn)


def test_tenants_without_requests_are_forgotten():
    turns = Turns()
    for i in range(5000):
        turns.advance(turns.next_turn(f"t{i}", 1))
        turns.advance(i + 1)
    assert turns.num_tenants < 1100


def test_no_tenant_can_hold_all_the_room():
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
    with router.admit(8, tenant="A"):  # more than the limit fits an empty queue
        pass
    assert not router.tenants


async def test_a_small_tenant_does_not_wait_for_a_flood():
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
