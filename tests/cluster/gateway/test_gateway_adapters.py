"""A gateway's part in loading an adapter: what it refuses by itself, what it hands to the controller, and when it answers."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.checkpoints.adapters import write_adapter
from support.checkpoints.tiny import write_tiny_checkpoint
from support.fakes.engines import make_config

from cluster.adapters import registry as transitions
from cluster.adapters.registry import EMPTY
from cluster.adapters.served import ServedAdapters
from cluster.adapters.store import FILES
from cluster.api.server.errors import NotFoundError
from cluster.gateway.adapters import GatewayAdapters
from cluster.protocol.adapters import AdapterRevision, Registry
from workers.errors import CheckpointError, RequestError


class FakeController:
    """Holds the registry; `error`: raised by the next call. `files`: what it could have read."""

    def __init__(self) -> None:
        self.registry = EMPTY
        self.error: Exception | None = None
        self.files: dict[str, bytes] = {}

    async def load_adapter(self, revision: AdapterRevision, read: Any, *, in_place: bool) -> Registry:
        if self.error is not None:
            raise self.error
        self.files = read()
        begun = transitions.begin(self.registry, revision, in_place=in_place)
        self.registry = transitions.loaded(begun, revision.id, now=5.0)
        return self.registry

    async def change_adapter(self, change: str, name: str) -> Registry:
        self.registry = getattr(transitions, change)(self.registry, name)
        return self.registry


class World:
    def __init__(self, folder: Path, **engine: Any) -> None:
        model = write_tiny_checkpoint(folder / "model")
        self.engine = make_config(model, **({"enable_lora": True} | engine))
        self.source = write_adapter(folder / "source", self.engine.model, rank=4)
        self.controller, self.served = FakeController(), ServedAdapters()
        self.data = folder / "data"
        config: Any = SimpleNamespace(engine=self.engine, model_name="demo", deployment="demo", data_dir=str(self.data))
        self.adapters = GatewayAdapters(config, self.controller, self.served)  # type: ignore[arg-type]

    def copies(self) -> list[Path]:
        return sorted((self.data / "adapters").iterdir())


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def load(world: World, name: str = "support", **options: Any) -> AdapterRevision:
    """With a view that arrives a moment later."""
    before = world.controller.registry
    task = asyncio.create_task(world.adapters.load(name, options.pop("source", str(world.source)), **options))
    async with asyncio.timeout(5):
        while not task.done() and world.controller.registry == before:
            await asyncio.sleep(0.005)
    await asyncio.sleep(0.02)
    assert not task.done(), "it answers when this gateway serves it"
    world.served.update(world.controller.registry)
    return await task


async def test_it_copies_checks_and_answers_when_it_serves(world):
    revision = await load(world)
    assert (revision.name, revision.source, revision.rank, revision.loaded_at) == (
        "support",
        str(world.source),
        4,
        5.0,
    )
    assert revision.id == f"support@{revision.digest}" and world.served.names == ("support",)
    assert world.controller.files == {name: (world.source / name).read_bytes() for name in FILES}
    assert [path.name for path in world.copies()] == [revision.digest]
    write_adapter(world.source, world.engine.model, seed=1)
    assert (world.copies()[0] / FILES[1]).read_bytes() == world.controller.files[FILES[1]]


async def test_the_same_content_is_the_same_revision_and_another_one_is_not(world, tmp_path):
    first = await load(world)
    other = write_adapter(tmp_path / "other", world.engine.model, seed=1)
    second = await load(world, source=str(other), share=0.25)
    assert first.digest != second.digest
    more = await load(world, source=str(other), share=0.5)
    assert more.id == second.id
    adapter = world.served.registry.adapters[0]
    assert (adapter.current, adapter.canary, adapter.canary_share) == (first.id, second.id, 0.5)


@pytest.mark.parametrize(
    ("source", "kind", "message"),
    [
        ("/not/there", NotFoundError, r"does not exist\. Give an existing folder, or a Hub id"),
        ("empty", RequestError, "adapter_config.json"),
    ],
)
async def test_a_source_that_is_not_an_adapter(world, tmp_path, source, kind, message):
    (tmp_path / "empty").mkdir()
    path = source if source.startswith("/") else str(tmp_path / source)
    with pytest.raises(kind, match=message) as e:
        await world.adapters.load("support", path)
    assert e.value.param == "lora_path"
    assert not world.data.exists() or not world.copies()


async def test_a_rank_above_the_limit_is_refused_in_the_words_of_the_source(tmp_path):
    world = World(tmp_path, max_lora_rank=2)
    with pytest.raises(RequestError, match="rank") as e:
        await world.adapters.load("support", str(world.source))
    assert str(world.data) not in str(e.value)
    assert not world.copies(), "no staged copy is left"


async def test_a_large_adapter_is_refused_before_it_is_copied(world, monkeypatch):
    monkeypatch.setattr("cluster.adapters.source.MAX_BYTES", 1000)
    with pytest.raises(RequestError, match=r"the limit is .* Save it in bfloat16"):
        await world.adapters.load("support", str(world.source))
    assert not world.data.exists()


async def test_what_the_controller_says_reaches_the_caller(world):
    world.controller.error = CheckpointError("Loading lora support failed: NaN.")
    with pytest.raises(RequestError, match="NaN"):
        await world.adapters.load("support", str(world.source))
    with pytest.raises(NotFoundError, match="'other' cannot be found"):
        await world.adapters.change("unload", "other")


async def test_the_model_itself_and_impossible_names_are_refused(world):
    for name in ("demo", "a@b"):
        with pytest.raises(RequestError) as e:
            await world.adapters.load(name, str(world.source))
        assert e.value.param == "lora_name"


async def test_without_adapters_it_says_how_to_start(tmp_path):
    world = World(tmp_path, enable_lora=False)
    with pytest.raises(RequestError, match="--enable-lora, or with --lora NAME=PATH") as e:
        await world.adapters.load("support", str(world.source))
    assert e.value.code == "lora_disabled"
    with pytest.raises(RequestError, match="without adapters"):
        await world.adapters.change("promote", "support")
