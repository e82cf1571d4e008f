"""From a cloud's notice to a drained node, with everything real but Ray and the cloud: poller, controller, fleet, router, engines."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from types import SimpleNamespace

import pytest
from ray.exceptions import RayActorError
from support.fakes.metadata import FakeMetadata, serving
from support.servers.live_replica import TOKEN, LiveReplica

import cluster.controller.controller as controller_module
import cluster.controller.preemption.act as act_module
import cluster.controller.preemption.watch as watch_module
from cluster.controller.controller import Controller
from cluster.controller.preemption import metadata
from cluster.controller.preemption.watch import NodeWatcher, NoticeActor
from cluster.gateway.fleet import Fleet
from cluster.protocol.report import GatewayReport
from cluster.protocol.spec import ClusterSpec
from cluster.protocol.view import RankRecord, ReplicaRecord, ReplicaState
from cluster.replicas.client import ReplicaClient
from cluster.router.router import Router
from workers.protocol import GenerateRequest, SamplingParams

GRACE_S = {"aws": 120.0, "gcp": 30.0, "azure": 30.0}
NUM_TOKENS = 64
NODES = {"r0": "near", "r1": "far", "r2": "near"}


class EngineReplica:
    """A ManagedReplica in this process; its name determines its node."""

    def __init__(self, replica_id: str, on_change) -> None:
        self.replica_id = replica_id
        self._on_change = on_change
        self._live: LiveReplica | None = None
        self._client: ReplicaClient | None = None
        rank = RankRecord(rank=0, node_id=NODES[replica_id], node_ip=f"ip-of-{NODES[replica_id]}", actor_name="")
        self._record = ReplicaRecord(
            replica_id=replica_id, incarnation="i", state=ReplicaState.STARTING, ranks=(rank,), token=TOKEN
        )

    def record(self) -> ReplicaRecord:
        return self._record

    async def start(self) -> None:
        self._live = await asyncio.to_thread(LiveReplica, replica_id=self.replica_id)
        self._record = replace(self._record, state=ReplicaState.READY, address=self._live.address)
        self._on_change()

    def lost_reason(self, now: float) -> str | None:
        return None

    async def close(self, reason: str | None) -> None:
        if self._live is not None:
            await asyncio.to_thread(self._live.close)


class Remote:
    """An actor handle without Ray: `actor.method.remote(...)` runs the method here."""

    def __init__(self, actor: object) -> None:
        self._actor = actor

    def __getattr__(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(remote=getattr(self._actor, name))


def start_actor(node_id: str, option, log_level: str) -> Remote:
    """Only the node "far" is in a cloud."""
    return Remote(NoticeActor(option if node_id == "far" else "off", log_level))


def local_watcher(on_change, *, start_actor=start_actor) -> NodeWatcher:
    """Without Ray, on a head node that is in no cloud."""
    return NodeWatcher(on_change, here="head", find_cloud=lambda option: None, start_actor=start_actor)


class World(Controller):
    def make_replica(self, replica_id: str, incarnation: str | None = None) -> EngineReplica:
        return EngineReplica(replica_id, self.note_change)

    def make_watcher(self, on_notice) -> NodeWatcher:
        return local_watcher(on_notice)


class FromNear:
    """The controller, called from a gateway on the node "near"."""

    def __init__(self, world: World) -> None:
        self._world = world

    async def sync(self, known: int, report: GatewayReport | None):
        return await self._world.sync(known, report, "near")

    async def leave(self, gateway_id: str) -> None:
        await self._world.leave(gateway_id)


@pytest.fixture
def no_ray(monkeypatch) -> SimpleNamespace:
    seen = SimpleNamespace(killed=[], told=[])

    async def find_ranks(deployment):
        return {}

    monkeypatch.setattr(controller_module, "find_ranks", find_ranks)
    monkeypatch.setattr(controller_module, "remove_all", lambda d, keep: None)
    monkeypatch.setattr(controller_module, "draining_nodes", dict)
    monkeypatch.setattr(controller_module, "SCALING_INTERVAL_S", 0.02)
    monkeypatch.setattr(act_module, "drain_node", lambda node_id, cause, deadline: seen.told.append(node_id))
    monkeypatch.setattr(watch_module, "ray", SimpleNamespace(kill=seen.killed.append))
    monkeypatch.setattr(watch_module, "node_addresses", lambda: {n: f"ip-of-{n}" for n in NODES.values()})
    monkeypatch.setattr(watch_module, "RETRY_S", 0.01)
    monkeypatch.setattr(metadata, "AWS_INTERVAL_S", 0.05)
    monkeypatch.setattr(metadata, "AZURE_INTERVAL_S", 0.05)
    return seen


@pytest.fixture(params=GRACE_S)
async def metadata_service(request, monkeypatch) -> AsyncIterator[FakeMetadata]:
    fake = FakeMetadata(request.param)
    async with serving(fake) as url:
        monkeypatch.setenv(metadata.METADATA_URL_ENV, url)
        yield fake


async def until(condition) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


async def generate(router: Router, seed: int) -> list[int]:
    sampling = SamplingParams(max_tokens=NUM_TOKENS, seed=seed, ignore_eos=True, temperature=1.0)
    request = GenerateRequest(request_id=secrets.token_hex(4), prompt_token_ids=[1, 5, 6, 7 + seed], sampling=sampling)
    return [i async for delta in router.generate(request) for i in delta.token_ids]


async def test_streams_outlive_the_node_and_their_tokens_stay_the_same(metadata_service, no_ray):
    cloud = metadata_service.cloud
    spec = ClusterSpec(
        model_name="m",
        engine=None,
        min_replicas=2,
        max_replicas=2,
        preemption_notices=cloud,  # type: ignore[arg-type]
    )
    world, router = World("demo", spec), Router(policy="round_robin")
    await world.start()
    fleet = Fleet(FromNear(world), router, gateway_id="g", url="http://g")
    syncing = asyncio.create_task(fleet.run())
    try:
        await until(lambda: [r.state for r in router.health().replicas] == ["ready", "ready"])
        expected = await asyncio.gather(*(generate(router, seed) for seed in range(6)))
        running = [asyncio.create_task(generate(router, seed)) for seed in range(6)]
        await until(lambda: router.report("g", "").streams_per_replica == {"r0": 3, "r1": 3})
        began = time.time()
        metadata_service.announce(GRACE_S[cloud])
        later = [asyncio.create_task(generate(router, seed)) for seed in range(6)]
        assert await asyncio.gather(*running, *later) == expected * 2
        await until(lambda: world.view().notices and world.view().notices[0].drained_at is not None)
        (notice,) = world.view().notices
        print(f"{cloud}: noticed after {notice.seen_at - began:.2f} s, drained after {notice.drained_at - began:.2f} s")
        assert notice.drained_at - began < GRACE_S[cloud]
        assert router.num_failovers_total >= 1, "no stream had to move"
        await until(lambda: {r.replica_id: r.state for r in world.view().replicas} == {"r0": "ready", "r2": "ready"})
        assert (notice.node_ip, no_ray.told) == ("ip-of-far", ["far"])
        await until(lambda: no_ray.killed)  # the node needs no poller any more, and its Ray may end
    finally:
        syncing.cancel()
        await asyncio.gather(syncing, return_exceptions=True)
        await fleet.close()
        await world.down()


class DyingActor(NoticeActor):
    async def start(self) -> bool:
        raise RayActorError


async def test_a_poller_that_dies_is_started_again(metadata_service, no_ray):
    started = []

    def start_dying_first(node_id: str, option, log_level: str) -> Remote:
        started.append(node_id)
        return Remote(DyingActor(option, log_level)) if len(started) == 1 else start_actor(node_id, option, log_level)

    watch = local_watcher(lambda: None, start_actor=start_dying_first)
    watch.configure(metadata_service.cloud)
    watch.update(["far"])
    metadata_service.announce(60.0)
    await until(lambda: watch.notices)
    assert len(started) == 2
    assert len(no_ray.killed) == 1
    watch.update([])
    assert watch.notices, "the notice is shown until its deadline"
    watch.configure("off")
    watch.update(["far"])
    assert watch.notices == ()
    await watch.close()


async def test_without_a_cloud_nothing_is_polled(no_ray):
    watch = local_watcher(lambda: None)
    watch.configure("auto")
    watch.update([])
    (task,) = asyncio.all_tasks() - {asyncio.current_task()}
    await task
    for _ in range(3):
        watch.update([])
    assert asyncio.all_tasks() == {asyncio.current_task()}, "the node is polled again and again"
    await watch.close()
