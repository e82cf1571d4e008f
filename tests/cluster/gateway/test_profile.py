"""When a gateway records which replica, and what becomes of it when one is lost. Replicas are fakes; the file is real."""

import asyncio
import json

import pytest

from cluster.gateway.profile import Profile
from cluster.gateway.profile_targets import GATEWAY_TARGETS
from cluster.profile.file import ProfileFile
from cluster.protocol.view import ClusterView, RankRecord, ReplicaRecord, ReplicaState
from workers.errors import ReplicaUnavailableError
from workers.profile.recording import Recording, TraceEvent, make_recording
from workers.profile.spans import SpanRecorder

NOW_NS = 1_790_000_000 * 10**9


def recording(num_steps: int) -> Recording:
    event = TraceEvent(ph="X", name="execute", pid=0, tid=1, ts=0.0, dur=5.0)
    return make_recording(
        [event], base_ns=NOW_NS, began_ns=NOW_NS, ended_ns=NOW_NS + 5000, threads={}, num_steps=num_steps
    )


class FakeRecorder:
    """One replica with two ranks. `done` gets its result: the number of steps, or an error."""

    num_ranks = 2

    def __init__(self, replica_id: str) -> None:
        self.replica_id = replica_id
        self.started = asyncio.Event()
        self.done: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def start(self) -> None:
        self.started.set()

    async def end(self) -> None:
        if not self.done.done():
            self.done.set_result(0)

    async def recordings(self, max_events: int) -> dict[int, tuple[Recording, int]]:
        num_steps = await self.done
        return {rank: (recording(num_steps), 0) for rank in (0, 1)} if num_steps else {}


class Cluster:
    """`add` makes a replica ready."""

    def __init__(self, path) -> None:
        self.path = path
        self.said: list[str] = []
        self.recorders: dict[str, FakeRecorder] = {}
        self._replicas: list[ReplicaRecord] = []
        self.profile = Profile(
            ProfileFile(path=path, num_steps=5), self._view, say=self.said.append, make_recorder=self._recorder
        )

    def add(self, replica_id: str) -> FakeRecorder:
        ranks = tuple(
            RankRecord(rank=i, node_id="n", node_ip="127.0.0.1", actor_name=f"{replica_id}{i}") for i in (0, 1)
        )
        self._replicas.append(
            ReplicaRecord(replica_id=replica_id, incarnation="1", state=ReplicaState.READY, ranks=ranks)
        )
        self.recorders[replica_id] = FakeRecorder(replica_id)
        return self.recorders[replica_id]

    def processes(self) -> list[str]:
        events = json.loads(self.path.read_text())["traceEvents"]
        return [event["args"]["name"] for event in events if event["name"] == "process_name"]

    def _view(self) -> ClusterView:
        return ClusterView(version=0, controller_id="c", replicas=tuple(self._replicas))

    def _recorder(self, record: ReplicaRecord, num_steps: int) -> FakeRecorder:
        assert num_steps == 5
        return self.recorders[record.replica_id]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "trace.json"


async def test_the_file_has_the_gateway_and_every_rank(path):
    cluster = Cluster(path)
    cluster.add("r0").done.set_result(5)
    cluster.add("r1").done.set_result(4)
    await cluster.profile.start()
    await cluster.profile.written()
    assert cluster.processes() == [
        "gateway", "replica r0 rank 0", "replica r0 rank 1", "replica r1 rank 0", "replica r1 rank 1",
    ]  # fmt: skip
    (said,) = cluster.said
    assert "5 steps" in said
    await cluster.profile.close()


async def test_a_replica_that_is_lost_does_not_take_the_others_traces_with_it(path, caplog):
    cluster = Cluster(path)
    cluster.add("r0").done.set_exception(ReplicaUnavailableError("Rank 1 of replica r0 was lost."))
    cluster.add("r1").done.set_result(5)
    await cluster.profile.start()
    await cluster.profile.written()
    assert cluster.processes() == ["gateway", "replica r1 rank 0", "replica r1 rank 1"]
    assert "The profile is without replica r0: Rank 1 of replica r0 was lost." in caplog.text
    await cluster.profile.close()


async def test_a_replica_that_comes_in_the_place_of_a_lost_one_records(path):
    cluster = Cluster(path)
    cluster.add("r0").done.set_exception(ReplicaUnavailableError("gone"))
    await cluster.profile.start()
    late = cluster.add("r1")
    await asyncio.wait_for(late.started.wait(), 10)
    late.done.set_result(5)
    await cluster.profile.written()
    assert cluster.processes() == ["gateway", "replica r1 rank 0", "replica r1 rank 1"]
    await cluster.profile.close()


async def test_a_server_that_stops_writes_what_there_is(path):
    cluster = Cluster(path)
    recorder = cluster.add("r0")
    recorder.end = lambda: asyncio.sleep(0, recorder.done.set_result(2))
    await cluster.profile.start()
    await cluster.profile.finish(asyncio.Event())
    assert "2 steps" in cluster.said[0]
    await cluster.profile.close()


async def test_without_a_request_there_is_no_file(path):
    cluster = Cluster(path)
    cluster.add("r0")
    await cluster.profile.start()
    await cluster.profile.finish(asyncio.Event())
    assert cluster.said == [f"No step was recorded, so {path} is not written."]
    assert not path.exists()
    await cluster.profile.close()


def test_everything_that_is_named_exists_and_is_itself_again_afterwards():
    before = [getattr(target.owner, target.name) for target in GATEWAY_TARGETS]
    recorder = SpanRecorder(GATEWAY_TARGETS)
    recorder.start()
    recorder.stop()
    assert [getattr(target.owner, target.name) for target in GATEWAY_TARGETS] == before
