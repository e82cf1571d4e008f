"""The controller without Ray: its replicas are fakes, and a namespace stands for what it stores in Ray."""

import asyncio
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from support.fakes.core import FACTS

import cluster.controller.controller as controller_module
import cluster.controller.preemption.act as act_module
from cluster.adapters.registry import EMPTY
from cluster.adapters.store import FILES
from cluster.controller import gateway_table
from cluster.controller.controller import Controller
from cluster.protocol.adapters import AdapterRevision, Registry, RevisionState
from cluster.protocol.report import GatewayReport
from cluster.protocol.spec import ClusterSpec
from cluster.protocol.view import NodeNotice, RankRecord, ReplicaRecord, ReplicaState
from cluster.replicas.adapter_files import AdapterContent
from workers.errors import ConfigError, ReplicaUnavailableError, RequestError
from workers.protocol import EngineFacts

SPEC = ClusterSpec(model_name="m", engine="engine", max_replicas=2, drain_timeout_s=20.0)  # type: ignore[arg-type]


class FakeAdapters:
    held: frozenset[str] = frozenset()

    async def load(self, content: AdapterContent) -> None:
        self.held |= {content.revision}

    async def unload(self, revision: str) -> None:
        self.held -= {revision}


class FakeReplica:
    def __init__(self, replica_id: str, incarnation: str, on_change) -> None:
        self.replica_id = replica_id
        self.adapters = FakeAdapters()
        self.closed = 0
        self._on_change = on_change
        self._record = ReplicaRecord(
            replica_id=replica_id,
            incarnation=incarnation,
            state=ReplicaState.STARTING,
            ranks=(RankRecord(rank=0, node_id=f"node-of-{replica_id}", node_ip="", actor_name=""),),
        )

    def record(self) -> ReplicaRecord:
        return self._record

    def report_facts(self, facts: EngineFacts) -> None:
        self._record = replace(self._record, facts=facts)
        self._on_change()

    async def start(self) -> None:
        self._record = replace(self._record, state=ReplicaState.READY)
        self._on_change()

    async def adopt(self, descriptions):
        if descriptions == ["silent"]:
            raise RuntimeError("its node is unknown")
        await self.start()
        return self

    def lost_reason(self, now: float) -> str | None:
        return None

    async def close(self, reason: str | None) -> None:
        self.closed += 1


class FakeWatcher:
    """A scripted NodeWatcher: `say` sets its notice."""

    def __init__(self, on_change) -> None:
        self.on_change = on_change
        self.notices: tuple[NodeNotice, ...] = ()
        self.num_notices_total = 0
        self.option = None
        self.nodes: set[str] = set()

    def configure(self, option) -> None:
        self.option = option

    def update(self, nodes) -> None:
        self.nodes = set(nodes)

    async def close(self) -> None: ...

    def say(self, node_id: str, left_s: float, *, is_head: bool = False) -> None:
        now = time.time()
        self.notices = (
            NodeNotice(
                node_id=node_id,
                node_ip="10.0.0.2",
                is_head=is_head,
                source="aws",
                cause="AWS terminates this spot instance.",
                deadline=now + left_s,
                seen_at=now,
            ),
        )
        self.num_notices_total += 1
        self.on_change()


class World(Controller):
    def __init__(self, spec: ClusterSpec = SPEC, registry: Registry = EMPTY) -> None:
        self.made: list[FakeReplica] = []
        super().__init__("demo", spec, registry)

    def make_replica(self, replica_id: str, incarnation: str | None = None) -> FakeReplica:
        self.made.append(FakeReplica(replica_id, incarnation or f"i{len(self.made)}", self.note_change))
        return self.made[-1]

    def make_watcher(self, on_notice) -> FakeWatcher:
        self.watcher = FakeWatcher(on_notice)
        return self.watcher

    def states(self) -> dict[str, str]:
        return {r.replica_id: r.state.value for r in self.view().replicas}

    async def until(self, condition) -> None:
        async with asyncio.timeout(5):
            while not condition():
                await asyncio.sleep(0.005)

    async def ready(self, count: int) -> None:
        await self.until(lambda: list(self.states().values()) == ["ready"] * count)


@pytest.fixture
def ray(monkeypatch):
    """What the controller finds and stores in Ray."""
    ray = SimpleNamespace(running={}, saved_spec=None, saved_adapters=EMPTY, spared=None, draining={}, told=[])

    async def find_ranks(deployment):
        return ray.running

    async def content_of(revision, store, *, single_host):
        return AdapterContent(revision=revision.id, folder=str(store.path(revision.digest)))

    monkeypatch.setattr(controller_module, "find_ranks", find_ranks)
    monkeypatch.setattr(controller_module, "remove_all", lambda d, keep: setattr(ray, "spared", set(keep)))
    monkeypatch.setattr(controller_module, "save_spec", lambda d, spec: setattr(ray, "saved_spec", spec))
    monkeypatch.setattr(
        controller_module, "save_registry", lambda d, registry: setattr(ray, "saved_adapters", registry)
    )
    monkeypatch.setattr(controller_module, "content_of", content_of)
    monkeypatch.setattr(gateway_table, "RETURN_S", 0.2)
    monkeypatch.setattr(controller_module, "draining_nodes", lambda: ray.draining)
    monkeypatch.setattr(act_module, "drain_node", lambda node_id, cause, deadline: ray.told.append(node_id))
    monkeypatch.setattr(controller_module, "SCALING_INTERVAL_S", 0.02)
    return ray


@pytest.fixture
async def world(ray):
    world = World()
    await world.start()
    yield world
    await world.down()


def report(gateway_id: str = "g", **streams: int) -> GatewayReport:
    return GatewayReport(gateway_id=gateway_id, url="http://g", streams_per_replica=streams)


async def test_the_spec_is_saved_for_the_next_controller(world, ray):
    spec = replace(SPEC, min_replicas=2)
    await world.apply(spec)
    assert ray.saved_spec == spec
    await world.ready(2)


async def test_running_replicas_are_adopted_and_all_other_ranks_are_ended(ray):
    ray.running = {("r0", "aa"): ["silent"], ("r1", "bb"): [{}], ("r1", "cc"): [{}], ("r2", "dd"): [{}]}
    world = World(replace(SPEC, min_replicas=2))
    await world.start()
    try:
        assert world.states() == {"r1": "ready", "r2": "ready"}
        assert ray.spared == {("r1", "bb"), ("r2", "dd")}, "half-started replicas would be left over"
        assert [r.closed for r in world.made] == [1, 0, 1, 0]
    finally:
        await world.down()


async def test_a_drain_waits_until_every_gateway_has_seen_it(world):
    """Also a drain by the supervisor: a request may be on its way to a replica that shows no streams yet."""
    await world.apply(replace(SPEC, min_replicas=2))
    await world.ready(2)
    await world.sync(-1, report("slow"))
    known = world.view().version
    await world.apply(replace(SPEC, min_replicas=1, max_replicas=1))
    await world.until(lambda: "draining" in world.states().values())
    for _ in range(3):
        await world.sync(known, report("slow"))
        assert len(world.states()) == 2, "it was ended while a gateway could still send to it"
    await world.sync(world.view().version, report("slow"))
    await world.ready(1)


async def test_an_unknown_replica_cannot_be_drained(world):
    await world.ready(1)
    with pytest.raises(RequestError, match="The replicas are: r0"):
        await world.drain("r9")


async def test_a_preempted_node_shortens_a_drain_that_has_begun(world, ray):
    await world.ready(1)
    await world.sync(-1, report(r0=1))
    await world.drain("r0", grace_s=500.0)
    ray.draining = {"node-of-r0": int((time.time() + 12.0) * 1000)}
    await world.until(lambda: _drain_until(world) is not None and _drain_until(world) < time.time() + 8.0)


async def test_a_node_with_a_notice_is_drained_at_once(world, ray):
    """Its replica drains until shortly before the deadline, another one starts, Ray is told, and the notice shows when it is drained."""
    await world.ready(1)
    await world.sync(-1, report(r0=1))
    await world.until(lambda: world.watcher.nodes == {"node-of-r0"})
    world.watcher.say("node-of-r0", 120.0)
    assert world.states()["r0"] == "draining", "nothing waits for the next round"
    assert _drain_until(world) == pytest.approx(time.time() + 110.0, abs=9.0)
    record = next(r for r in world.view().replicas if r.replica_id == "r0")
    assert record.is_leaving and "10.0.0.2 will be removed" in record.reason
    await world.until(lambda: world.states() == {"r0": "draining", "r1": "ready"})
    (notice,) = world.view().notices
    assert notice.drained_at is None and world.view().num_notices_total == 1
    await world.sync(world.view().version, report(r1=1))
    await world.until(lambda: world.states() == {"r1": "ready"})
    await world.until(lambda: world.view().notices[0].drained_at is not None)
    assert ray.told == ["node-of-r0"]


async def test_the_last_replica_serves_until_another_can(world, monkeypatch):
    await world.ready(1)
    gate = asyncio.Event()

    async def start(self) -> None:
        await gate.wait()
        self._record = replace(self._record, state=ReplicaState.READY)

    monkeypatch.setattr(FakeReplica, "start", start)
    world.watcher.say("node-of-r0", 120.0)
    await world.until(lambda: world.states() == {"r0": "draining", "r1": "starting"})
    for _ in range(3):
        await world.sync(world.view().version, report())
    assert world.made[0].closed == 0, "no replica would serve"
    gate.set()
    await world.until(lambda: world.states() == {"r1": "ready"})


async def test_a_notice_far_ahead_is_only_shown(world):
    await world.ready(1)
    world.watcher.say("node-of-r0", 3600.0)
    await world.sync(world.view().version, report())
    assert world.states() == {"r0": "ready"}
    assert len(world.view().notices) == 1
    world.watcher.say("node-of-r0", 100.0)
    assert world.states()["r0"] == "draining"


async def test_when_the_head_node_is_preempted_nothing_moves_and_nothing_starts(world, ray):
    await world.ready(1)
    world.watcher.say("node-of-r0", 30.0, is_head=True)
    assert world.states() == {"r0": "ready"}, "there is nowhere to move to"
    await world.apply(replace(SPEC, min_replicas=2))
    for _ in range(3):
        await world.sync(world.view().version, report())
    assert world.states() == {"r0": "ready"}
    assert ray.told == []
    world.watcher.notices = ()
    world.watcher.on_change()
    await world.ready(2)


async def test_the_source_of_notices_can_change(world):
    assert world.watcher.option == "auto"
    await world.apply(replace(SPEC, preemption_notices="off"))
    assert world.watcher.option == "off"


async def test_another_model_is_refused_while_there_are_replicas_or_gateways(world):
    await world.ready(1)
    other = replace(SPEC, model_name="other")
    with pytest.raises(ConfigError, match="tramontane down"):
        await world.apply(other)
    world.made[0].report_facts(FACTS)  # without facts the controller keeps one replica
    await world.apply(replace(SPEC, min_replicas=0, scale_down_after_s=0.1))
    async with asyncio.timeout(5):
        while world.states():
            await world.sync(world.view().version, report())
    with pytest.raises(ConfigError, match="tramontane down"):
        await world.apply(other)
    await world.leave("g")
    await world.apply(other)
    assert world.view().facts is None, "requests would be checked against the model that was served before"


async def test_sync_returns_changes_at_once_and_waits_without(world, monkeypatch):
    monkeypatch.setattr(controller_module, "SYNC_WAIT_S", 60.0)
    monkeypatch.setattr(controller_module, "STEADY_SYNC_WAIT_S", 60.0)
    await world.until(lambda: any(r.ready_at for r in world.view().replicas))
    began = time.monotonic()
    view = await world.sync(-1, None)
    assert time.monotonic() - began < 20.0
    waiting = asyncio.create_task(world.sync(view.version, None))
    await asyncio.sleep(0.01)
    assert not waiting.done()
    await world.drain("r0", grace_s=0.0)
    assert (await waiting).version > view.version


async def test_gateways_report_rarely_while_nothing_depends_on_their_reports(world, monkeypatch):
    monkeypatch.setattr(controller_module, "SYNC_WAIT_S", 0.0)
    monkeypatch.setattr(controller_module, "STEADY_SYNC_WAIT_S", 60.0)
    await world.ready(1)
    # The autoscaler needs them.
    await world.sync(world.view().version, report())
    await world.apply(replace(SPEC, max_replicas=1))
    await world.ready(1)
    waiting = asyncio.create_task(world.sync(world.view().version, report()))
    await asyncio.sleep(0.01)
    assert not waiting.done()
    await world.drain("r0", grace_s=60.0)
    await waiting
    # A replica that drains ends once no gateway has a stream on it.
    await world.sync(world.view().version, report(r0=1))
    assert "draining" in world.states().values()


async def test_down_ends_every_replica(ray):
    world = World(replace(SPEC, min_replicas=2))
    await world.start()
    await world.ready(2)
    assert await world.down() == 2
    assert all(r.closed for r in world.made)


async def test_adoption_that_fails_as_a_whole_still_leads_to_replicas(ray, monkeypatch):
    async def broken(deployment):
        raise ReplicaUnavailableError("Ray does not answer.")

    monkeypatch.setattr(controller_module, "find_ranks", broken)
    world = World()
    await world.start()
    try:
        await world.ready(1)
    finally:
        await world.down()


def _drain_until(world: World) -> float | None:
    return next((r.drain_until for r in world.view().replicas if r.replica_id == "r0"), None)


@pytest.mark.parametrize(("single_host", "later"), [(False, None), (True, 60.0)])
async def test_only_the_first_replica_waits_for_a_limited_time_where_the_cluster_may_grow(ray, single_host, later):
    world = World(replace(SPEC, placement_timeout_s=60.0, single_host=single_host))
    assert world.placement_timeout_s == 60.0
    await world.start()
    try:
        await world.ready(1)
        world.made[0].report_facts(FACTS)
        assert world.placement_timeout_s == later
    finally:
        await world.down()


ADAPTERS = replace(SPEC, engine=SimpleNamespace(enable_lora=True), min_replicas=2)
CONTENT = dict.fromkeys(FILES, b"x")
REVISION = AdapterRevision(id="support@d1", name="support", source="/a", digest="d1", rank=8, num_bytes=2)


def loads_adapters(world: World) -> list[set[str]]:
    return [set(r.adapters.held) for r in world.made if not r.closed]


def using(num: int) -> GatewayReport:
    return replace(report(), streams_per_adapter={"support@d1": num} if num else {})


async def test_an_adapter_is_in_the_view_and_leaves_when_every_gateway_has_seen_it(ray):
    world = World(ADAPTERS)
    await world.start()
    try:
        await world.ready(2)
        await world.sync(-1, using(0))
        assert await world.load_adapter(REVISION, CONTENT) == world.view().adapters == ray.saved_adapters
        assert loads_adapters(world) == [{"support@d1"}] * 2
        known = world.view().version
        await world.change_adapter("unload", "support")
        await asyncio.sleep(0.25)  # longer than RETURN_S
        for seen, num in ((known, 0), (world.view().version, 1)):
            for _ in range(2):
                await world.sync(seen, using(num))
            assert loads_adapters(world) == [{"support@d1"}] * 2, "a gateway may still use it"
        await world.sync(world.view().version, using(0))
        await world.until(lambda: loads_adapters(world) == [set()] * 2)
    finally:
        await world.down()


async def test_a_restarted_controller_waits_for_the_gateways_of_the_one_before(ray, monkeypatch):
    """Their last version means nothing to it, and their streams are not reported yet."""
    world = World(ADAPTERS)
    await world.start()
    await world.ready(2)
    await world.load_adapter(REVISION, CONTENT)
    known = world.view().version
    await world.change_adapter("unload", "support")
    running = {(r.replica_id, f"i{i}"): [{}] for i, r in enumerate(world.made)}
    world.adapters.store.close()
    await world.down()
    ray.running = running
    retiring = replace(world.view().adapters, revisions=(replace(REVISION, state=RevisionState.RETIRING),))
    again = World(ADAPTERS, retiring)
    monkeypatch.setattr(FakeAdapters, "held", frozenset({"support@d1"}))
    await again.start()
    try:
        assert again.view().version > known, "what a gateway saw before must not count as seen"
        assert loads_adapters(again) == [{"support@d1"}] * 2
        await asyncio.sleep(0.3)  # longer than RETURN_S
        assert loads_adapters(again) == [{"support@d1"}] * 2, "a gateway that is late may have a stream on it"
        await again.sync(again.view().version, using(1))
        await again.sync(again.view().version, using(1))
        assert loads_adapters(again) == [{"support@d1"}] * 2
        await again.sync(again.view().version, using(0))
        await again.until(lambda: loads_adapters(again) == [set()] * 2)
    finally:
        await again.down()


async def test_without_adapters_the_engine_loads_none(ray):
    world = World(replace(SPEC, engine=SimpleNamespace(enable_lora=False)))
    with pytest.raises(ConfigError, match=r"is served without adapters\. Start the server with --enable-lora"):
        await world.load_adapter(REVISION, CONTENT)
