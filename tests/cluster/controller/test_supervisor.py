"""The supervisor with scripted replicas: what `plan` decides, and that the supervisor does it."""

import asyncio
import itertools
from dataclasses import replace

import pytest

from cluster.controller.supervisor import MAX_BACKOFF_S, RELEASE_S, Drain, Start, Supervisor, backoff_s, plan
from cluster.protocol.view import ReplicaRecord, ReplicaState, StartFailure
from workers.errors import CheckpointError, ConfigError, ReplicaUnavailableError
from workers.protocol import LoadReport


def record(replica_id: str, state: ReplicaState = ReplicaState.READY, *, num_running: int = 0, started_at: float = 0.0):
    load = LoadReport(num_running=num_running)
    return ReplicaRecord(replica_id=replica_id, incarnation="i", state=state, load=load, started_at=started_at)


@pytest.mark.parametrize(
    ("desired", "replicas", "expected"),
    [
        (0, [], []),
        (2, [], [Start("r0"), Start("r1")]),
        (2, [record("r1")], [Start("r0")]),
        (1, [record("r0", ReplicaState.LOST)], [Start("r1")]),
        (1, [record("r0", ReplicaState.DRAINING)], [Start("r1")]),
        (2, [record("r0"), record("r1", ReplicaState.PLACING)], []),
        (1, [record("r0"), record("r1", ReplicaState.PLACING)], [Drain("r1")]),
        (1, [record("r0", num_running=3), record("r1", num_running=1)], [Drain("r1")]),
        (1, [record("r0", started_at=1.0), record("r1", started_at=2.0)], [Drain("r1")]),
        (0, [record("r0"), record("r1", ReplicaState.DRAINING)], [Drain("r0")]),
    ],
)
def test_plan(desired, replicas, expected):
    assert plan(desired, replicas) == expected


def test_the_ids_of_one_of_several_deployments_begin_with_its_name():
    assert plan(2, [], prefix="chat-") == [Start("chat-r0"), Start("chat-r1")]


def test_backoff_grows_and_is_bounded():
    waits = [backoff_s(n) for n in range(12)]
    assert waits[:5] == [0, 0, 1, 2, 4]
    assert waits == sorted(waits)
    assert waits[-1] == MAX_BACKOFF_S


class FakeReplica:
    """Starts when `go` is set, fails with `error`, is lost once `lost` has a reason."""

    def __init__(self, replica_id: str) -> None:
        self.replica_id = replica_id
        self.go = asyncio.Event()
        self.error: Exception | None = None
        self.lost: str | None = None
        self.closed: list[str | None] = []
        self.may_close = asyncio.Event()
        self.may_close.set()
        self._state = ReplicaState.STARTING

    def record(self) -> ReplicaRecord:
        return replace(record(self.replica_id), state=self._state)

    async def start(self) -> None:
        await self.go.wait()
        if self.error is not None:
            raise self.error
        self._state = ReplicaState.READY

    def lost_reason(self, now: float) -> str | None:
        return self.lost

    async def close(self, reason: str | None) -> None:
        self.closed.append(reason)
        await self.may_close.wait()


class World:
    """A supervisor with its own clock, and every replica it made."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.made: list[FakeReplica] = []
        self.streams: dict[str, int | None] = {}
        self.supervisor = Supervisor(
            self._make,
            num_streams=lambda replica_id: self.streams.get(replica_id, 0),
            clock=lambda: self.now,
            wall_clock=lambda: self.now,
        )

    def _make(self, replica_id: str) -> FakeReplica:
        self.made.append(FakeReplica(replica_id))
        return self.made[-1]

    async def tick(self, advance_s: float = 0.0) -> None:
        """Time passes, the supervisor runs a round, and its tasks get a chance to run."""
        self.now += advance_s
        self.supervisor.tick()
        for _ in range(5):
            await asyncio.sleep(0)

    async def settle(self) -> None:
        for replica in self.made:
            replica.go.set()
        for _ in range(4):
            await self.tick()

    def states(self) -> dict[str, str]:
        return {r.replica_id: r.state.value for r in self.supervisor.records()}


@pytest.fixture
async def world():
    world = World()
    yield world
    for replica in world.made:
        replica.may_close.set()
    await world.supervisor.close()


async def test_missing_replicas_are_started(world):
    world.supervisor.desired = 2
    await world.tick()
    assert world.states() == {"r0": "starting", "r1": "starting"}
    await world.settle()
    assert world.states() == {"r0": "ready", "r1": "ready"}


async def test_a_lost_replica_is_stopped_and_replaced(world):
    world.supervisor.desired = 1
    await world.tick()
    await world.settle()
    world.made[0].may_close.clear()
    world.made[0].lost = "Replica r0 lost rank 1: its process died."
    await world.tick()
    assert world.states() == {"r0": "lost"}, "the replacement must wait until the resources are free again"
    await world.tick(RELEASE_S)
    assert world.states() == {"r0": "lost", "r1": "starting"}
    assert world.made[0].closed == ["Replica r0 lost rank 1: its process died."]
    world.made[0].may_close.set()
    await world.settle()
    assert world.states() == {"r1": "ready"}


async def test_a_replica_that_keeps_failing_is_retried_with_growing_pauses(world):
    world.supervisor.desired = 1
    started_at = []
    for _ in range(600):
        before = len(world.made)
        await world.tick(0.1)
        if len(world.made) > before:
            started_at.append(world.now)
            world.made[-1].error = ReplicaUnavailableError("it failed")
            world.made[-1].go.set()
    pauses = [b - a for a, b in itertools.pairwise(started_at)]
    assert 5 <= len(pauses) <= 8, pauses
    assert pauses[0] < 0.5
    assert pauses[-1] > 10, "the pauses do not grow"


async def test_a_permanent_failure_is_reported_and_not_retried(world):
    world.supervisor.desired = 1
    await world.tick()
    world.made[0].error = CheckpointError("model.safetensors is truncated.", remedy="Download it again.")
    world.made[0].go.set()
    for _ in range(5):
        await world.tick(60.0)
    assert len(world.made) == 1
    assert world.supervisor.failure == StartFailure(
        kind="checkpoint", message="model.safetensors is truncated.", remedy="Download it again."
    )
    world.supervisor.forgive()
    await world.tick()
    assert len(world.made) == 2


async def test_one_nodes_broken_files_do_not_stop_the_others(world):
    world.supervisor.desired = 2
    await world.tick()
    world.made[0].go.set()
    await world.tick()
    await world.tick()
    world.made[1].error = CheckpointError("this node's copy is truncated.")
    world.made[1].go.set()
    for _ in range(3):
        await world.tick(60.0)
    assert world.supervisor.failure is None
    assert len(world.made) > 2, "the second replica is never retried"


async def test_a_spec_that_worked_once_is_retried_after_any_error(world):
    """A drained replica still holds the resources that its replacement needs, so the replacement may fail at first."""
    world.supervisor.desired = 1
    await world.tick()
    await world.settle()
    world.streams["r0"] = 1
    world.supervisor.drain("r0", grace_s=30.0)
    await world.tick()
    assert world.states() == {"r0": "draining", "r1": "starting"}
    world.made[1].error = ConfigError("No free resources were found in 10 s.")
    world.made[1].go.set()
    await world.tick(10.0)
    await world.tick()
    assert world.supervisor.failure is None, "the controller gave up because of a drain"
    world.streams["r0"] = 0
    await world.tick(2.0)
    await world.settle()
    assert list(world.states().values()) == ["ready"]


async def test_a_new_spec_can_fail_permanently(world):
    world.supervisor.desired = 1
    await world.tick()
    await world.settle()
    world.supervisor.desired = 0
    await world.settle()
    assert world.states() == {}
    world.supervisor.forgive()
    world.supervisor.desired = 1
    await world.tick()
    world.made[-1].error = CheckpointError("model.safetensors is truncated.")
    world.made[-1].go.set()
    await world.tick()
    await world.tick()
    assert world.supervisor.failure == StartFailure(kind="checkpoint", message="model.safetensors is truncated.")


async def test_an_error_in_one_round_does_not_end_supervision(world, monkeypatch):
    world.supervisor.desired = 1
    rounds = []
    tick = world.supervisor.tick

    def break_once() -> None:
        rounds.append(None)
        if len(rounds) == 1:
            raise RuntimeError("unexpected")
        tick()

    monkeypatch.setattr(world.supervisor, "tick", break_once)
    running = asyncio.create_task(world.supervisor.run())
    async with asyncio.timeout(5):
        while not world.made:
            assert not running.done(), "the supervision ended"
            await asyncio.sleep(0.01)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_drain_waits_for_the_streams(world):
    world.supervisor.desired = 1
    await world.tick()
    await world.settle()
    world.streams["r0"] = 2
    world.supervisor.drain("r0", grace_s=20)
    await world.tick()
    assert world.states() == {"r0": "draining", "r1": "starting"}
    assert world.supervisor.records()[0].drain_until == world.now + 20
    world.streams["r0"] = None  # a gateway has not seen the drain yet
    await world.tick(1)
    assert world.made[0].closed == []
    world.streams["r0"] = 0
    await world.tick(1)
    assert len(world.made[0].closed) == 1


async def test_a_drain_does_not_wait_forever(world):
    world.supervisor.desired = 1
    await world.tick()
    await world.settle()
    world.streams["r0"] = 1
    world.supervisor.drain("r0", grace_s=20)
    await world.tick(19)
    assert world.made[0].closed == []
    await world.tick(10)
    assert len(world.made[0].closed) == 1


async def test_a_second_drain_can_only_shorten_the_first(world):
    world.supervisor.desired = 1
    await world.tick()
    await world.settle()
    world.streams["r0"] = 1
    world.supervisor.drain("r0", grace_s=5)
    world.supervisor.drain("r0", grace_s=50)
    assert world.supervisor.records()[0].drain_until == world.now + 5


async def test_scaling_down_while_starting_cancels_the_start(world):
    world.supervisor.desired = 2
    await world.tick()
    world.made[0].go.set()
    await world.tick()
    await world.tick()
    world.supervisor.desired = 1
    for _ in range(3):
        await world.tick()
    assert world.states() == {"r0": "ready"}
    assert len(world.made[1].closed) == 1


async def test_close_ends_everything(world):
    world.supervisor.desired = 3
    await world.tick()
    await world.settle()
    await world.supervisor.close()
    assert all(len(r.closed) == 1 for r in world.made)
