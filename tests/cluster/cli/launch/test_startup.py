"""What a person sees and is told while the first replica starts."""

import asyncio
import io

import msgspec
import pytest
from support.fakes.core import FACTS

from cluster.cli.launch.startup import MAX_LOST, Startup
from cluster.cli.serve.banner import engine_line
from cluster.protocol.view import ClusterView, ReplicaRecord, ReplicaState, StartFailure
from cluster.router.router import Health
from cluster.terminal.phases import Console
from workers.errors import CheckpointError, ConfigError, ReplicaUnavailableError


class World:
    def __init__(self) -> None:
        self.stream = io.StringIO()
        self.startup = Startup(Console(self.stream), num_ranks=2)
        self.ready = False

    def health(self) -> Health:
        return Health(ready=self.ready, reason=None, replicas=())

    async def wait(self) -> None:
        async with asyncio.timeout(5):
            await self.startup.until_ready(self.health)


@pytest.fixture
def world() -> World:
    return World()


def record(state: str, *, incarnation: str = "a", replica_id: str = "r0", **fields) -> ReplicaRecord:
    return ReplicaRecord(replica_id=replica_id, incarnation=incarnation, state=ReplicaState(state), **fields)


def view(*records: ReplicaRecord, **fields) -> ClusterView:
    return ClusterView(version=1, controller_id="c", replicas=records, num_desired=1, **fields)


async def test_the_phases_of_one_replica_are_shown_in_order(world):
    world.startup.handle(view(record("placing")))
    for phase in ("joining", "loading", "starting"):
        world.startup.handle(view(record("starting", phase=phase), record("placing", replica_id="r1", incarnation="b")))
    world.startup.handle(view(record("ready")))
    world.ready = True
    await world.wait()
    world.startup.end()
    lines = [line.split("  ")[1] for line in world.stream.getvalue().splitlines()]
    assert lines == ["Placing 2 ranks", "Joining the ranks", "Loading the weights", "Starting the engine"]


async def test_why_it_waits_for_a_place_is_said_once(world):
    waiting = record("placing", reason="Needed: 2 ranks with 1 GPU each.")
    for _ in range(3):
        world.startup.handle(view(waiting))
    assert world.stream.getvalue().count("Needed:") == 1


@pytest.mark.parametrize(
    ("kind", "error"),
    [("config", ConfigError), ("checkpoint", CheckpointError), ("stopping", ReplicaUnavailableError)],
)
async def test_a_start_failure_is_raised_as_an_exception_of_its_kind(world, kind, error):
    world.startup.handle(view(failure=StartFailure(kind=kind, message="It is too big.", remedy="Use fewer blocks.")))
    with pytest.raises(error, match=r"It is too big\.") as raised:
        await world.wait()
    assert raised.value.remedy == "Use fewer blocks."


async def test_replicas_that_keep_dying_are_not_waited_for(world):
    waiting = asyncio.create_task(world.wait())
    for i in range(MAX_LOST):
        await asyncio.sleep(0)
        assert not waiting.done(), f"{i} lost replicas are not a reason to give up"
        world.startup.handle(view(record("lost", incarnation=str(i), reason=f"Lost number {i}.")))
    with pytest.raises(ReplicaUnavailableError, match=f"Lost number {MAX_LOST - 1}"):
        await waiting


async def test_behind_the_end_nothing_is_shown(world):
    world.startup.end()
    world.startup.handle(view(record("starting", phase="loading", reason="Later.")))
    assert world.stream.getvalue() == ""


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "100 KV blocks of 16 tokens; "),
        ({"kv_token_bytes": 131_072}, "100 KV blocks of 16 tokens, 128 KiB per token and rank; "),
        (
            {"kv_token_bytes": 67_584, "kv_cache_dtype": "int8", "tensor_parallel_size": 1},
            "100 KV blocks of 16 tokens in int8, 66 KiB per token; ",
        ),
    ],
)
def test_the_banner_says_what_a_token_takes_in_the_kv_cache(changes: dict[str, object], expected: str) -> None:
    assert expected in engine_line(msgspec.structs.replace(FACTS, **changes))
