"""How a Ray replica starts, when it counts as lost, and how it is ended; placement, actors and client are fakes, Ray is not started."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from support.fakes.core import FACTS

import cluster.replicas.adapters as adapters_module
import cluster.replicas.replica as replica_module
from cluster.protocol.view import ReplicaState
from cluster.replicas.adapter_files import AdapterContent
from cluster.replicas.adapters import ReplicaAdapters
from cluster.replicas.replica import HANG_IS_DEATH_S, LOST_AFTER_S, RayReplica
from workers.errors import ConfigError, ReplicaUnavailableError
from workers.protocol import LoadReport
from workers.rank.reports import LoadProgress, RankDescription, RankStats, Rendezvous, Started

SIZE = 2


class FakeClient:
    def __init__(self, replica_id: str, address: tuple[str, int], token: str) -> None:
        self.address = address
        self.connected = True
        self.condemned: str | None = None
        self.reason: str | None = None
        self.load = LoadReport()

    async def connect(self) -> None:
        pass

    def condemn(self, reason: str) -> None:
        self.condemned = reason

    def not_ready_reason(self, now: float) -> str | None:
        return self.condemned or self.reason

    def is_ready(self, now: float) -> bool:
        return self.not_ready_reason(now) is None

    async def close(self) -> None:
        self.connected = False


class FakeGang:
    """Plays all ranks. `fails`: method -> what it raises. `frozen`: methods that the last rank does not answer before `thaw`. `closed`:
    (placement group, whether the ranks were to be closed in order).
    """

    def __init__(self, replica_id: str, name: str, *, on_end: Any) -> None:
        self.replica_id = replica_id
        self.name = name
        self.end = on_end
        self.called: list[str] = []
        self.fails: dict[str, Exception] = {}
        self.frozen: set[str] = set()
        self.freezes: list[str] = []  # calls in which the last rank freezes: it answers nothing any more
        self._thawed = asyncio.Event()
        self.closed: list[tuple[object, bool]] = []
        self.answers: dict[str, list[object]] = {}

    def actor_name(self, rank: int) -> str:
        return f"{self.name}-rank{rank}"

    def create(self, config: object, group: object, **options: object) -> None:
        self.called.append("create")

    def find(self, size: int) -> None:
        self.called.append("find")

    def thaw(self) -> None:
        self.frozen.clear()
        self._thawed.set()

    async def call(self, rank: int, method: str, *arguments: object) -> Any:
        if method in self.freezes:
            self.frozen.add("progress")
        if method in self.frozen and rank == SIZE - 1 - (method == "address"):
            await self._thawed.wait()
        if method == "progress":
            return self._answer(method, rank)
        assert (rank, method) == (0, "address")
        return Rendezvous(host=str(arguments[0]), port=1, lifeline_port=2)

    async def call_all(self, method: str, *arguments: object, **options: object) -> list[Any]:
        if method not in ("progress", "stats"):  # polled in the background
            self.called.append(method)
        if method in self.fails:
            raise self.fails[method]
        if method in self.freezes:
            self.frozen.add("progress")
        if method in self.frozen:
            await self._thawed.wait()
        return [self._answer(method, rank) for rank in range(SIZE)]

    def _answer(self, method: str, rank: int) -> object:
        if method in self.answers:
            return self.answers[method][rank]
        answers = {
            "describe": description(rank),
            "start": Started(host="10.0.0.1", port=4000, facts=FACTS) if rank == 0 else None,
            "progress": LoadProgress(num_bytes_read=1, num_bytes_total=2),
            "stats": RankStats(num_steps_total=rank + 1),
        }
        return answers.get(method)

    async def close(self, group: object, *, answers: bool) -> None:
        self.closed.append((group, answers))


def description(rank: int, **changes: Any) -> RankDescription:
    return RankDescription(
        **{
            "replica_id": "r0",
            "incarnation": "abc",
            "rank": rank,
            "pid": 100 + rank,
            "hostname": "host",
            "phase": "serving",
            "node_id": f"node{rank}",
            "address": ("10.0.0.1", 4000) if rank == 0 else None,
            "token": "secret" if rank == 0 else None,
            "facts": FACTS if rank == 0 else None,
        }
        | changes
    )


class Stage:
    """A replica with its fakes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.states: list[str] = []
        self.reasons: list[str] = []
        monkeypatch.setattr(replica_module, "RankGang", self._make_gang)
        monkeypatch.setattr(replica_module, "ReplicaClient", self._make_client)
        monkeypatch.setattr(replica_module, "place", self._place)
        monkeypatch.setattr(replica_module, "node_ip", lambda node: f"10.0.0.{node[-1]}")
        monkeypatch.setattr(replica_module, "get_placement_group", lambda name: f"group of {name}")
        self.replica = self.make()

    def make(self, **options: Any) -> RayReplica:
        config: Any = SimpleNamespace(tensor_parallel_size=SIZE)
        self.replica = RayReplica("r0", config, deployment="demo", incarnation="abc", on_change=self._note, **options)
        return self.replica

    def _make_gang(self, *arguments: Any, **options: Any) -> FakeGang:
        self.gang = FakeGang(*arguments, **options)
        return self.gang

    def _make_client(self, *arguments: Any) -> FakeClient:
        self.client = FakeClient(*arguments)
        return self.client

    async def _place(
        self, name: str, config: object, *, on_group: Any, on_waiting: Any, **options: Any
    ) -> dict[int, str]:
        on_waiting("Needed: 2 ranks.")
        on_group("group")
        return {0: "node0", 1: "node1"}

    def _note(self) -> None:
        record = self.replica.record()
        if record.reason is not None:
            self.reasons.append(record.reason)
        state = record.phase or record.state.value
        if self.states[-1:] != [state]:
            self.states.append(state)


@pytest.fixture
def stage(monkeypatch) -> Stage:
    return Stage(monkeypatch)


@pytest.fixture
async def started(stage) -> Stage:
    await stage.replica.start()
    yield stage
    await stage.replica.close(None)


async def test_a_start_goes_through_its_phases_and_records_every_rank(started):
    assert started.gang.called == ["create", "join", "describe", "load", "start"]
    assert started.states == ["placing", "joining", "loading", "starting", "ready"]
    record = started.replica.record()
    assert (record.state, record.address, record.facts) == (ReplicaState.READY, ("10.0.0.1", 4000), FACTS)
    assert [(r.rank, r.pid, r.node_id, r.node_ip, r.actor_name) for r in record.ranks] == [
        (0, 100, "node0", "10.0.0.0", "demo-r0-abc-rank0"),
        (1, 101, "node1", "10.0.0.1", "demo-r0-abc-rank1"),
    ]


async def test_what_a_rank_raises_comes_out_of_start(stage):
    stage.gang.fails["load"] = ConfigError("It does not fit.")
    with pytest.raises(ConfigError, match="It does not fit"):
        await stage.replica.start()
    await stage.replica.close("failed")
    assert stage.gang.closed == [("group", False)]


async def test_a_rank_that_gave_its_reason_explains_a_failed_start(stage):
    stage.gang.fails["load"] = ReplicaUnavailableError("Replica r0 lost rank 0: its process died.")
    stage.gang.end("Rank 1 of replica r0 stopped: no room.")
    with pytest.raises(ReplicaUnavailableError, match=r"^Rank 1 of replica r0 stopped: no room\.$"):
        await stage.replica.start()


async def test_running_ranks_are_adopted(stage):
    await stage.replica.adopt([description(0), description(1)])
    assert stage.gang.called == ["find"]
    record = stage.replica.record()
    assert (record.state, record.token, [r.pid for r in record.ranks]) == (ReplicaState.READY, "secret", [100, 101])
    await stage.replica.close(None)
    assert stage.gang.closed == [("group of demo-r0-abc-apart", True)]


@pytest.mark.parametrize("found", [[description(1)], [description(0), description(1, phase="loading")]])
async def test_ranks_that_are_missing_or_not_serving_are_not_adopted(stage, found):
    with pytest.raises(ReplicaUnavailableError, match="found with ranks missing or not serving"):
        await stage.replica.adopt(found)


async def test_trouble_that_lasts_a_moment_is_not_a_loss(started):
    replica, client = started.replica, started.client
    assert replica.lost_reason(100.0) is None
    client.reason, client.connected = "no connection", False
    assert replica.lost_reason(101.0) is None
    assert replica.lost_reason(101.0 + LOST_AFTER_S / 2) is None
    client.reason = None
    assert replica.lost_reason(102.0) is None
    client.reason = "no connection"
    assert replica.lost_reason(103.0) is None, "the wait begins again"
    assert replica.lost_reason(103.1 + LOST_AFTER_S) == "no connection"


async def test_ranks_that_live_and_do_not_work_are_lost_in_the_end(started):
    started.client.reason = "no forward pass"
    assert started.replica.lost_reason(0.0) is None
    assert started.replica.lost_reason(HANG_IS_DEATH_S - 0.1) is None
    assert started.replica.lost_reason(HANG_IS_DEATH_S + 0.1) == "no forward pass"


async def test_a_reported_end_counts_at_once(started):
    started.gang.end("Replica r0 lost rank 1: its process died.")
    assert started.replica.lost_reason(0.0) == "Replica r0 lost rank 1: its process died."
    assert started.client.condemned == "Replica r0 lost rank 1: its process died.", "streams end too"


async def test_what_rank_0_said_on_its_connection_counts_at_once(started):
    started.client.condemned = "Replica r0 lost rank 1: its process died."
    assert started.replica.lost_reason(0.0) == "Replica r0 lost rank 1: its process died."


async def test_a_replica_that_works_is_closed_in_order(started):
    await started.replica.close(None)
    assert started.gang.closed == [("group", True)]
    await started.replica.close(None)
    assert started.gang.closed[1:] == [(None, False)], "close is idempotent"


@pytest.mark.parametrize("trouble", [{"connected": False}, {"reason": "waits for rank 1"}, {"condemned": "lost"}])
async def test_a_replica_that_does_not_answer_is_not_closed_in_order(started, trouble):
    """Its successor waits for the resources it holds."""
    for name, value in trouble.items():
        setattr(started.client, name, value)
    await started.replica.close("lost")
    assert started.gang.closed == [("group", False)]


async def test_adapters_come_after_the_weights_and_again_before_it_is_ready(stage):
    """What was loaded during its start would be missing otherwise."""
    steps: list[tuple[str | None, list[str]]] = []

    async def bring(adapters: ReplicaAdapters) -> None:
        steps.append((stage.replica.record().phase, stage.gang.called[-1:]))
        await adapters.load(AdapterContent(revision=f"support@{len(steps)}", folder="/a"))

    await stage.make(bring_adapters=bring).start()
    assert steps == [("loading", ["load"]), ("starting", ["start"])]
    assert stage.replica.adapters.held == {"support@1", "support@2"}
    await stage.replica.adapters.unload("support@1")
    assert stage.gang.called[-1] == "unload_adapter" and stage.replica.adapters.held == {"support@2"}
    await stage.replica.close(None)


async def test_an_adopted_replica_holds_what_all_of_its_ranks_hold(stage):
    async def bring(adapters: ReplicaAdapters) -> None: ...

    stage.make(bring_adapters=bring)
    stage.gang.answers["adapters"] = [("support@1", "support@2"), ("support@2",)]
    await stage.replica.adopt([description(0), description(1)])
    assert stage.replica.adapters.held == {"support@2"}
    await stage.replica.close(None)


async def test_a_rank_that_freezes_while_it_is_adopted_is_not_waited_for(stage, monkeypatch):
    """A controller that waited for it would report nothing: gateways would go on with the view of before, and requests wait for ever."""

    async def bring(adapters: ReplicaAdapters) -> None: ...

    monkeypatch.setattr(adapters_module, "ASK_TIMEOUT_S", 0.01)
    stage.make(bring_adapters=bring)
    stage.gang.frozen.add("adapters")
    with pytest.raises(ReplicaUnavailableError, match="Replica r0 did not say within"):
        await stage.replica.adopt([description(0), description(1)])
    await stage.replica.close(None)


@pytest.mark.parametrize("step", ["made", "address", "join", "describe", "load", "start"])
async def test_a_rank_that_freezes_while_it_starts_is_named_and_not_waited_for(stage, monkeypatch, step):
    """Alone in its replica, it has no other rank that would notice."""
    bounds = {"LOADING_SILENCE_S": 0.02, "MADE_WITHIN_S": 0.02, "QUIET_S": 0.01, "POLL_INTERVAL_S": 0.0}
    for name, value in bounds.items():
        monkeypatch.setattr(replica_module, name, value)
    stage.gang.frozen.add(step)
    stage.gang.frozen.add("progress") if step == "made" else stage.gang.freezes.append(step)
    silence = "Replica r0 starts, and rank 1 has given no sign of life for"
    with pytest.raises(ReplicaUnavailableError, match=silence):
        await stage.replica.start()
    assert any(silence in reason for reason in stage.reasons), "it is also said before"
    assert stage.gang.called[-1:] == {"made": ["create"], "address": ["create"]}.get(step, [step])
    await stage.replica.close(None)


async def test_what_was_said_of_a_silent_rank_is_taken_back(stage, monkeypatch):
    monkeypatch.setattr(replica_module, "QUIET_S", 0.01)
    stage.gang.frozen.add("progress")
    start = asyncio.create_task(stage.replica.start())
    while not any("sign of life" in reason for reason in stage.reasons):
        await asyncio.sleep(0.001)
    stage.gang.thaw()
    await start
    assert (stage.replica.record().state, stage.replica.record().reason) == (ReplicaState.READY, None)
    await stage.replica.close(None)


async def test_ranks_may_load_for_long_while_they_say_how_far_they_are(stage, monkeypatch):
    monkeypatch.setattr(replica_module, "LOADING_SILENCE_S", 0.01)
    monkeypatch.setattr(replica_module, "POLL_INTERVAL_S", 0.0)
    stage.gang.frozen.add("load")
    start = asyncio.create_task(stage.replica.start())
    for _ in range(20):  # many times as long as a silence may be
        await asyncio.sleep(0.005)
        assert not start.done()
    assert stage.replica.record().progress == (SIZE, 2 * SIZE)
    start.cancel()
    await asyncio.gather(start, return_exceptions=True)
    await stage.replica.close(None)
