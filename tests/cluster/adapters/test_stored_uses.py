"""A revision that a stored response names stays, although the gateway that ran the response has died."""

import asyncio

import pytest

from cluster.adapters.served import ServedAdapters
from cluster.adapters.stored_uses import StoredUses
from cluster.batch.errors import StoreError
from cluster.protocol.adapters import AdapterRevision, Registry, RevisionState


def registry(**states: str) -> Registry:
    revisions = (
        AdapterRevision(
            id=f"a@{digest}", name="a", source="/a", digest=digest, rank=8, num_bytes=1, state=RevisionState(state)
        )
        for digest, state in states.items()
    )
    return Registry(revisions=tuple(revisions))


class Store:
    def __init__(self) -> None:
        self.named: set[str] = set()
        self.error: StoreError | None = None
        self.may_answer = asyncio.Event()
        self.num_asked = 0

    async def ask(self) -> set[str]:
        await self.may_answer.wait()
        self.num_asked += 1
        if self.error is not None:
            raise self.error
        return self.named


async def test_a_retiring_revision_is_held_until_the_store_does_not_name_it(monkeypatch):
    monkeypatch.setattr("cluster.adapters.stored_uses.ASK_EVERY_S", 0.01)
    served, store = ServedAdapters(), Store()
    uses = StoredUses(served)
    task = uses.watch(store.ask)

    async def until(expected: dict[str, int]) -> None:
        async with asyncio.timeout(5):
            while uses.streams() != expected:
                await asyncio.sleep(0.005)

    try:
        served.update(registry(a="ready", b="ready"))
        assert uses.streams() == {}
        store.named = {"a@a"}
        served.update(registry(a="retiring", b="retiring"))
        with served.using("a@b"):
            assert uses.streams() == {"a@a": 1, "a@b": 2}, "nothing is known before the store has answered"
            store.may_answer.set()
            await until({"a@a": 1, "a@b": 1})
        await until({"a@a": 1})
        store.error = StoreError("It is locked.")
        asked = store.num_asked
        while store.num_asked < asked + 2:
            await asyncio.sleep(0.005)
        store.named = set()
        assert uses.streams() == {"a@a": 1}, "while it cannot be asked, what it said last counts"
        store.error = None
        await until({})
    finally:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


def test_without_a_store_the_requests_of_the_gateway_count():
    served = ServedAdapters()
    served.update(registry(a="retiring"))
    with served.using("a@a"):
        assert StoredUses(served).streams() == {"a@a": 1}
    assert StoredUses(served).streams() == {}
