"""The keeper of adapters with replicas that are fakes: what is loaded where and when, what serves, and what a restart finds."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cluster.adapters.registry import EMPTY, find_adapter, find_revision
from cluster.adapters.store import FILES, AdapterStore
from cluster.controller.adapters import AdapterKeeper
from cluster.protocol.adapters import Adapter, AdapterRevision, Registry
from cluster.replicas.adapter_files import AdapterContent
from workers.errors import CheckpointError, ReplicaUnavailableError, RequestError

CONTENT = dict.fromkeys(FILES, b"x")


class Holder:
    """A replica's adapters. `hold`: loads wait for it. `fails`: revision id -> what loading it raises."""

    def __init__(self) -> None:
        self.held: frozenset[str] = frozenset()
        self.gate = asyncio.Event()
        self.gate.set()
        self.fails: dict[str, Exception] = {}
        self.unloaded: list[str] = []

    async def load(self, content: AdapterContent) -> None:
        await self.gate.wait()
        if content.revision in self.fails:
            raise self.fails[content.revision]
        assert all((Path(content.folder) / name).exists() for name in FILES)
        self.held |= {content.revision}

    async def unload(self, revision: str) -> None:
        self.held -= {revision}
        self.unloaded.append(revision)


class World:
    """A keeper with two replicas, and what it saves."""

    def __init__(self, folder: Path, registry: Registry = EMPTY) -> None:
        self.serving = {"r0": Holder(), "r1": Holder()}
        self.saved: list[Registry] = []
        self.seen: list[Registry] = []
        self.streams: dict[str, int | None] = {}
        self.scaled_to_zero = False
        self.store = AdapterStore(folder)
        self.keeper = AdapterKeeper(
            self.store,
            registry,
            serving=lambda: self.serving,
            save=self.saved.append,
            on_change=lambda: self.seen.append(self.keeper.registry),
            num_streams=lambda revision: self.streams.get(revision, 0),
            may_serve_alone=lambda: self.scaled_to_zero,
            content=self._content,
        )

    async def _content(self, revision: AdapterRevision, store: AdapterStore) -> AdapterContent:
        return AdapterContent(revision=revision.id, folder=str(store.path(revision.digest)))

    async def load(self, digest: str, **options) -> Registry:
        registry = await self.keeper.load(
            revision(digest, options.pop("share", None)), CONTENT, in_place=True, **options
        )
        assert registry is not None
        return registry

    def roles(self) -> tuple[str | None, ...]:
        adapter = find_adapter(self.keeper.registry, "support")
        return (None,) * 3 if adapter is None else (adapter.current, adapter.canary, adapter.previous)

    def held(self) -> list[set[str]]:
        return [{r.partition("@")[2] for r in holder.held} for holder in self.serving.values()]

    async def until(self, condition) -> None:
        async with asyncio.timeout(5):
            while not condition():
                await asyncio.sleep(0.005)


def revision(digest: str, share: float | None = None) -> AdapterRevision:
    return AdapterRevision(
        id=f"support@{digest}", name="support", source="/a", digest=digest, rank=8, num_bytes=2, share=share
    )


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr("cluster.controller.adapters.TICK_S", 0.01)
    monkeypatch.setattr("cluster.controller.adapters.RETRY_S", 0.01)


@pytest.fixture
async def world(tmp_path) -> AsyncIterator[World]:
    world = World(tmp_path)
    running = asyncio.create_task(world.keeper.run())
    yield world
    assert not running.done()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await world.keeper.end()
    assert not any(tmp_path.iterdir()), "a deployment that is taken down leaves no contents"


async def test_an_adapter_serves_only_when_all_replicas_have_it(world):
    world.serving["r1"].gate.clear()
    loading = asyncio.create_task(world.load("a"))
    await world.until(lambda: world.held() == [{"a"}, set()])
    assert world.roles() == (None, None, None) and not loading.done()
    world.serving["r1"].gate.set()
    await loading
    assert world.roles() == ("support@a", None, None) and world.held() == [{"a"}, {"a"}]
    assert world.saved == world.seen, "what is seen was saved before"


async def test_a_load_that_takes_too_long_is_given_up_and_a_first_replica_is_waited_for(world, monkeypatch):
    monkeypatch.setattr("cluster.controller.adapters.LOAD_TIMEOUT_S", 0.05)
    serving, world.serving = world.serving, {}
    loading = asyncio.create_task(world.load("a"))
    await asyncio.sleep(0.15)
    assert not loading.done() and find_revision(world.keeper.registry, "support@a").state == "loading"
    serving["r1"].gate.clear()
    world.serving = serving
    with pytest.raises(CheckpointError, match="Not all replicas loaded it within 0 s"):
        async with asyncio.timeout(5):
            await loading
    assert find_revision(world.keeper.registry, "support@a").state == "failed"
    serving["r1"].gate.set()
    await world.until(lambda: world.held() == [set(), set()])


async def test_a_load_whose_caller_is_gone_ends_too(tmp_path, monkeypatch):
    """The controller that it asked has died, and so has its gateway."""
    monkeypatch.setattr("cluster.controller.adapters.LOAD_TIMEOUT_S", 0.05)
    world = World(tmp_path, Registry(adapters=(Adapter(name="support"),), revisions=(revision("a"),)))
    world.serving["r0"].gate.clear()
    running = asyncio.create_task(world.keeper.run())
    try:
        await world.until(lambda: find_revision(world.keeper.registry, "support@a").state == "failed")
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await world.keeper.end()


async def test_a_replica_that_becomes_ready_meanwhile_is_waited_for(world):
    for holder in world.serving.values():
        holder.gate.clear()
    loading = asyncio.create_task(world.load("a"))
    await world.until(lambda: find_revision(world.keeper.registry, "support@a") is not None)
    late = Holder()
    await world.keeper.bring(late)
    assert late.held == {"support@a"}, "it must hold what is being loaded, because that may serve in a moment"
    world.serving["r2"] = late
    for holder in world.serving.values():
        holder.gate.set()
    await loading


async def test_a_replica_that_starts_gets_everything_also_what_came_during_its_start(world):
    await world.load("a")
    late = Holder()
    late.gate.clear()
    bringing = asyncio.create_task(world.keeper.bring(late))
    await world.load("b", share=0.5)
    late.gate.set()
    await bringing
    assert late.held == {"support@a", "support@b"}


async def test_a_retiring_revision_stays_until_no_gateway_uses_it(world):
    world.streams["support@a"] = None  # some gateway has not seen that it retires
    await world.load("a")
    await world.keeper.unload("support")
    late = Holder()
    await world.keeper.bring(late)
    assert late.held == {"support@a"}, "a stream may move to the new replica"
    world.serving["r2"] = late
    world.streams["support@a"] = 1
    await asyncio.sleep(0.05)
    assert world.held() == [{"a"}] * 3
    world.streams["support@a"] = 0
    await world.until(lambda: world.held() == [set()] * 3)
    await world.until(lambda: world.store.held == set())
    assert world.keeper.registry.revisions == ()


async def test_a_canary_is_loaded_promoted_and_rolled_back(world):
    await world.load("a")
    await world.load("b", share=0.1)
    assert world.roles() == ("support@a", "support@b", None)
    await world.keeper.promote("support")
    assert world.roles() == ("support@b", None, "support@a") and world.held() == [{"a", "b"}] * 2
    await world.keeper.rollback("support")
    assert world.roles() == ("support@a", None, None)
    await world.until(lambda: world.held() == [{"a"}] * 2)


async def test_a_load_that_fails_on_one_replica_is_undone_everywhere(world, caplog):
    await world.load("a")
    world.serving["r1"].fails["support@b"] = CheckpointError("q_proj of layer 3 has NaN.")
    with pytest.raises(CheckpointError, match=r"Loading lora support failed: q_proj of layer 3 has NaN."):
        await world.load("b")
    assert world.roles() == ("support@a", None, None)
    await world.until(lambda: world.held() == [{"a"}] * 2)
    await world.until(lambda: world.store.held == {"a"})
    world.serving["r1"].fails.clear()
    await world.load("b")
    assert world.roles() == ("support@b", None, "support@a")


async def test_a_replica_that_dies_during_a_load_is_not_waited_for(world):
    world.serving["r1"].fails["support@a"] = ReplicaUnavailableError("Replica r1 lost rank 0: its process died.")
    loading = asyncio.create_task(world.load("a"))
    await world.until(lambda: world.held() == [{"a"}, set()])
    del world.serving["r1"]
    await loading


async def test_a_broken_adapter_does_not_keep_the_first_replica_from_starting(world):
    world.serving.clear()
    loading = asyncio.create_task(world.load("a"))
    await world.until(lambda: find_revision(world.keeper.registry, "support@a") is not None)
    first = Holder()
    first.fails["support@a"] = CheckpointError("NaN.")
    await world.keeper.bring(first)
    assert first.held == frozenset()
    with pytest.raises(CheckpointError, match="NaN"):
        await loading
    assert world.keeper.registry.revisions[0].state == "failed"


async def test_an_adapter_that_others_serve_keeps_a_replica_that_cannot_load_it_from_serving(world):
    await world.load("a")
    late = Holder()
    late.fails["support@a"] = CheckpointError("No memory.")
    with pytest.raises(CheckpointError, match="No memory"):
        await world.keeper.bring(late)
    assert world.roles() == ("support@a", None, None)


async def test_it_serves_at_once_where_no_replica_runs(world):
    world.serving.clear()
    world.scaled_to_zero = True
    await world.load("a")
    assert world.roles() == ("support@a", None, None)


async def test_a_content_of_another_node_is_asked_for(world):
    assert await world.keeper.load(revision("a"), in_place=False) is None
    assert world.keeper.registry == EMPTY
    await world.load("a")
    assert await world.keeper.load(revision("a"), in_place=True) == world.keeper.registry


async def test_a_restarted_controller_finishes_what_it_finds(world, tmp_path):
    """The load that its predecessor began, and the unload."""
    for holder in world.serving.values():
        holder.gate.clear()
    loading = asyncio.create_task(world.load("a"))
    await world.until(lambda: world.saved)
    loading.cancel()
    await asyncio.gather(loading, return_exceptions=True)
    again = World(tmp_path, world.saved[-1])
    running = asyncio.create_task(again.keeper.run())
    assert await again.load("a", again=True) == again.keeper.registry
    assert again.roles() == ("support@a", None, None)
    assert await again.load("a", again=True) == again.keeper.registry, "the caller that asks again has no second load"
    await again.keeper.unload("support")
    await again.until(lambda: again.held() == [set()] * 2)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await again.keeper.end()
    world.serving.clear()
    await world.keeper.unload("support")


async def test_an_unload_ends_a_load_in_progress(world):
    world.serving["r1"].gate.clear()
    loading = asyncio.create_task(world.load("a"))
    await world.until(lambda: world.held()[0] == {"a"})
    await world.keeper.unload("support")
    with pytest.raises(RequestError, match="was unloaded while it was being loaded"):
        await loading
    world.serving["r1"].gate.set()
