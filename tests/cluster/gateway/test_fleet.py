"""The fleet with a scripted controller, and replicas that are real stream servers with a fake core."""

import asyncio
import contextlib
import time

import pytest
from support.fakes.core import FACTS
from support.fakes.engine import TOKEN, FakeEngine

from cluster.gateway.fleet import Fleet, availability_of, describe
from cluster.protocol.report import GatewayReport
from cluster.protocol.spec import ClusterSpec
from cluster.protocol.view import ClusterView, ReplicaRecord, ReplicaState, StartFailure
from workers.errors import ReplicaUnavailableError

FAILURE = StartFailure(kind="config", message="It is too big.", remedy="Use fewer blocks.")


class FakeController:
    """`say(view)` sets the answer of the next sync; an exception is raised."""

    def __init__(self) -> None:
        self.known: list[int] = []
        self.left: list[str] = []
        self._answers: asyncio.Queue[ClusterView | Exception] = asyncio.Queue()

    def say(self, answer: ClusterView | Exception) -> None:
        self._answers.put_nowait(answer)

    async def sync(self, known: int, report: GatewayReport | None) -> ClusterView:
        assert report is not None
        self.known.append(known)
        answer = await self._answers.get()
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def leave(self, gateway_id: str) -> None:
        self.left.append(gateway_id)


class FakeRouter:
    def __init__(self) -> None:
        self.replicas = []
        self.availability = None

    def update(self, replicas, availability) -> None:
        self.replicas, self.availability = list(replicas), availability

    def report(self, gateway_id: str, url: str) -> GatewayReport:
        return GatewayReport(gateway_id=gateway_id, url=url)


class World:
    def __init__(self) -> None:
        self.controller = FakeController()
        self.router = FakeRouter()
        self.seen: list[int] = []
        self.fleet = Fleet(self.controller, self.router, gateway_id="g-1", url="http://here", on_view=self._on_view)

    def _on_view(self, view: ClusterView) -> None:
        self.seen.append(view.version)
        if view.scaling_reason == "raise":
            raise BrokenPipeError("the terminal is closed")

    def names(self) -> list[str]:
        return [r.replica_id for r in self.router.replicas]


@pytest.fixture
def engine():
    engine = FakeEngine()
    yield engine
    engine.close()


@pytest.fixture
async def world(monkeypatch):
    monkeypatch.setattr("cluster.gateway.fleet.RETRY_S", 0.01)
    world = World()
    task = asyncio.create_task(world.fleet.run())
    yield world
    assert not task.done(), "the fleet stopped syncing"
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await world.fleet.close()


def record(engine, replica_id: str = "r0", *, incarnation: str = "a", state=ReplicaState.READY, **fields):
    return ReplicaRecord(
        replica_id=replica_id, incarnation=incarnation, state=state, address=engine.address, token=TOKEN, **fields
    )


def view(version: int, *records: ReplicaRecord, **fields) -> ClusterView:
    return ClusterView(version=version, controller_id="c", replicas=records, num_desired=1, **fields)


async def until(condition, timeout_s: float = 10) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)


async def test_a_ready_replica_is_connected_and_shown_to_the_router(world, engine):
    world.controller.say(view(1, record(engine)))
    await until(lambda: world.names() == ["r0"])
    assert world.router.replicas[0].facts == FACTS
    await until(lambda: world.controller.known == [-1, 1])


async def test_a_lost_replica_is_removed_from_the_router_and_its_streams_end(world, engine):
    world.controller.say(view(1, record(engine)))
    await until(lambda: world.names() == ["r0"])
    client = world.router.replicas[0]
    world.controller.say(view(2, record(engine, state=ReplicaState.LOST, reason="Replica r0 lost rank 1.")))
    await until(lambda: world.names() == [])
    assert client.condemned == "Replica r0 lost rank 1."


async def test_a_new_incarnation_is_another_replica(world, engine):
    world.controller.say(view(1, record(engine)))
    await until(lambda: world.names() == ["r0"])
    first = world.router.replicas[0]
    world.controller.say(view(2, record(engine, incarnation="b")))
    await until(lambda: world.router.replicas and world.router.replicas[0] is not first)
    assert first.condemned is not None


async def test_a_draining_replica_has_its_deadline(world, engine):
    world.controller.say(view(1, record(engine, state=ReplicaState.DRAINING, drain_until=time.time() + 700)))
    await until(lambda: world.names() == ["r0"])
    assert world.router.replicas[0].drain_until == pytest.approx(time.monotonic() + 700, abs=20)


async def test_a_replica_lost_during_its_connection_is_closed(world, engine):
    """Its connection opens after it was dropped, and must not stay open."""
    async with held_open() as (address, release):
        late = ReplicaRecord(replica_id="r0", incarnation="a", state=ReplicaState.READY, address=address, token=TOKEN)
        world.controller.say(view(1, late))
        await until(lambda: world.seen == [1])
        client = world.fleet.clients["r0", "a"]
        await asyncio.sleep(0.05)  # the connection waits for its first answer
        world.controller.say(view(2))
        await until(lambda: world.seen == [1, 2])
        release(engine.address)
        await until(lambda: world.fleet.num_pending == 0)
    assert not client.connected, "a dropped replica stays connected"
    world.controller.say(view(3, record(engine, "r1")))
    await until(lambda: world.names() == ["r1"])


async def test_routing_continues_while_the_controller_is_down(world, engine):
    world.controller.say(view(1, record(engine)))
    await until(lambda: world.names() == ["r0"])
    for _ in range(3):
        world.controller.say(ReplicaUnavailableError("The controller cannot be reached."))
    await until(lambda: len(world.controller.known) == 5)
    assert world.names() == ["r0"]
    assert world.router.replicas[0].connected


async def test_an_unexpected_error_does_not_end_the_fleet(world, engine):
    world.controller.say(view(1, scaling_reason="raise"))
    world.controller.say(ValueError("another version"))
    world.controller.say(view(2, record(engine)))
    await until(lambda: world.names() == ["r0"])


async def test_close_leaves_the_controller(world, engine):
    world.controller.say(view(1, record(engine)))
    await until(lambda: world.names() == ["r0"])
    client = world.router.replicas[0]
    await world.fleet.close()
    assert world.controller.left == ["g-1"]
    assert not client.connected


@pytest.mark.parametrize(
    ("fields", "expected", "scaled_to_zero"),
    [
        ({"num_desired": 1}, True, False),
        ({"num_desired": 0, "facts": FACTS}, True, True),
        ({"num_desired": 0}, False, False),
        ({"num_desired": 1, "failure": FAILURE}, False, False),
        ({"num_desired": 0, "facts": FACTS, "failure": FAILURE}, False, False),
    ],
)
def test_what_requests_can_expect_of_a_view(fields, expected, scaled_to_zero):
    spec = ClusterSpec(model_name="m", engine=None, min_replicas=0)  # type: ignore[arg-type]
    availability = availability_of(ClusterView(version=1, controller_id="c", spec=spec, **fields))
    assert (availability.expected, availability.scaled_to_zero) == (expected, scaled_to_zero)
    assert availability.reason == ("It is too big. Use fewer blocks." if "failure" in fields else None)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"state": ReplicaState.PLACING}, "Replica r0 waits for free resources."),
        ({"state": ReplicaState.STARTING, "phase": "loading", "progress": (1, 4)}, "Replica r0 is loading (25 %)."),
        ({"state": ReplicaState.STARTING, "phase": "loading"}, "Replica r0 is loading."),
        ({"state": ReplicaState.LOST, "reason": "Replica r0 lost rank 1."}, "Replica r0 lost rank 1."),
    ],
)
def test_a_replica_that_is_not_ready_is_described(fields, says):
    assert describe(ReplicaRecord(replica_id="r0", incarnation="a", **fields)) == says


@contextlib.asynccontextmanager
async def held_open():
    """An address whose connections hang until `release(address)` says where they lead."""
    target: asyncio.Future[tuple[str, int]] = asyncio.get_running_loop().create_future()
    tasks: set[asyncio.Task] = set()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.current_task())
        with contextlib.closing(writer):
            onward_reader, onward = await asyncio.open_connection(*await target)
            with contextlib.closing(onward), contextlib.suppress(OSError):
                back = asyncio.create_task(pipe(onward_reader, writer))
                await pipe(reader, onward)
                back.cancel()
                await asyncio.gather(back, return_exceptions=True)

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[:2], target.set_result
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
