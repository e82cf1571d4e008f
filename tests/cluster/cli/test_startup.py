"""What a person sees and is told while the first replica starts."""

import asyncio
import io

import pytest

from cluster.cli.startup import MAX_LOST, Startup
from cluster.protocol.view import ClusterView, ReplicaRecord, ReplicaState
from cluster.router.router import Health
from cluster.terminal.phases import Console
from workers.errors import CheckpointError, ConfigError, ReplicaUnavailableError, TramontaneError


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
    world.startup.take(view(record("placing")))
    for phase in ("joining", "loading", "starting"):
        world.startup.take(view(record("starting", phase=phase), record("placing", replica_id="r1", incarnation="b")))
    world.startup.take(view(record("ready")))
    world.ready = True
    await world.wait()
    world.startup.end()
    lines = [line.split("  ")[1] for line in world.stream.getvalue().splitlines()]
    assert lines == ["Placing 2 rank(s)", "Joining the ranks", "Loading the weights", "Starting the engine"]


async def test_why_it_waits_for_a_place_is_said_once(world):
    waiting = record("placing", reason="Needed: 2 ranks with 1 GPU each.")
    for _ in range(3):
        world.startup.take(view(waiting))
    assert world.stream.getvalue().count("Needed:") == 1


@pytest.mark.parametrize(
    ("name", "kind"),
    [("ConfigError", ConfigError), ("CheckpointError", CheckpointError), ("OfAnotherVersion", TramontaneError)],
)
async def test_a_failure_that_will_repeat_is_raised_as_what_it_is(world, name, kind):
    world.startup.take(view(failure=(name, "It cannot be.")))
    with pytest.raises(kind, match=r"It cannot be\."):
        await world.wait()


async def test_replicas_that_keep_dying_are_not_waited_for(world):
    waiting = asyncio.create_task(world.wait())
    for i in range(MAX_LOST):
        await asyncio.sleep(0)
        assert not waiting.done(), f"{i} lost replicas are no reason to give up"
        world.startup.take(view(record("lost", incarnation=str(i), reason=f"Lost number {i}.")))
    with pytest.raises(ReplicaUnavailableError, match=f"Lost number {MAX_LOST - 1}"):
        await waiting


async def test_behind_the_end_nothing_is_shown(world):
    world.startup.end()
    world.startup.take(view(record("starting", phase="loading", reason="Later.")))
    assert world.stream.getvalue() == ""
