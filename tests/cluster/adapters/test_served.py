"""What one gateway serves: the choice of a revision, the names, and the count of requests that use a revision."""

import asyncio

from cluster.adapters.served import ServedAdapters, choose
from cluster.protocol.adapters import Adapter, AdapterRevision, Registry, RevisionState

IDS = [f"req-{i}" for i in range(2000)]


def registry(*adapters: Adapter, **states: str) -> Registry:
    """states: of the revisions of "support", by digest."""
    revisions = tuple(
        AdapterRevision(
            id=f"support@{digest}",
            name="support",
            source="/a",
            digest=digest,
            rank=8,
            num_bytes=1,
            state=RevisionState(state),
            reason="NaN." if state == "failed" else None,
        )
        for digest, state in states.items()
    )
    return Registry(adapters=adapters, revisions=revisions)


def test_a_canary_gets_its_share_and_the_same_request_always_the_same():
    adapter = Adapter(name="support", current="support@a", canary="support@b", canary_share=0.1)
    chosen = {i for i in IDS if choose(adapter, i) == "support@b"}
    assert 140 < len(chosen) < 260, "a tenth of 2,000, within four standard deviations"
    assert chosen == {i for i in IDS if choose(adapter, i) == "support@b"}
    more = Adapter(name="support", current="support@a", canary="support@b", canary_share=0.5)
    assert chosen < {i for i in IDS if choose(more, i) == "support@b"}, "a larger share takes nobody back"
    whole = Adapter(name="support", current="support@a", canary="support@b", canary_share=1.0)
    assert {choose(whole, i) for i in IDS} == {"support@b"}


def test_names_and_ids_of_ready_revisions_are_served():
    served = ServedAdapters()
    served.update(registry(Adapter(name="support", current="support@a"), a="ready", b="retiring"))
    assert served.names == ("support",)
    assert [served.resolve(n, "r") for n in ("support", "support@a", "support@b", "x")] == [
        "support@a",
        "support@a",
        None,
        None,
    ]
    assert served.knows("support@a") and not served.knows("support@b") and not served.knows("x")
    assert served.adapter_of("support@a") == served.adapter_of("support") == "support"


def test_why_an_adapter_does_not_serve():
    served = ServedAdapters()
    served.update(registry(Adapter(name="support"), a="loading"))
    assert served.is_first_load("support") and served.why_not("support") == "The adapter support@a is being loaded."
    served.update(registry(Adapter(name="support"), a="failed"))
    assert not served.is_first_load("support") and served.why_not("x") is None
    assert served.why_not("support") == "The adapter support@a could not be loaded: NaN."


def test_requests_are_counted_until_they_end():
    served = ServedAdapters()
    with served.using("support@a"), served.using("support@a"), served.using("support@b"):
        assert served.streams() == {"support@a": 2, "support@b": 1}
    assert served.streams() == {}


def test_revisions_that_are_gone_are_told():
    gone: list[set[str]] = []
    served = ServedAdapters(on_gone=gone.append)
    served.update(registry(Adapter(name="support", current="support@a"), a="ready", b="retiring"))
    served.update(registry(Adapter(name="support", current="support@a"), a="ready"))
    assert gone == [{"support@b"}]


async def test_waiting_for_the_first_load_ends_with_it_or_in_time():
    served = ServedAdapters()
    served.update(registry(Adapter(name="support"), a="loading"))
    waiting = asyncio.create_task(served.until(lambda _: not served.is_first_load("support"), timeout_s=5))
    await asyncio.sleep(0)
    served.update(registry(Adapter(name="support"), a="loading", b="failed"))
    await asyncio.sleep(0)
    assert not waiting.done()
    served.update(registry(Adapter(name="support", current="support@a"), a="ready"))
    async with asyncio.timeout(1):
        await waiting
    await served.until(lambda _: False, timeout_s=0.01)
