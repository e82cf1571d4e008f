"""One replica as Ray runs it: a placement group with a bundle per rank, an actor in each, and their end.

Knows Ray and the phases of `workers.shard.ShardWorker`; knows nothing of tokens, which travel through `client`. The replica
is the unit of failure: when one rank dies, the client is told which, and the replica is over.
"""

import asyncio
import contextlib
import logging
import secrets
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Literal, Self

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.replicas.client import ReplicaClient
from workers.config import EngineConfig
from workers.errors import ConfigError, GroupError, ReplicaUnavailableError, TramontaneError

log = logging.getLogger(__name__)

PhaseName = Literal["placing", "joining", "loading", "starting"]
OnPhase = Callable[[PhaseName], None]
OnProgress = Callable[[int, int], None]

PLACEMENT_TIMEOUT_S = 60.0
PROGRESS_INTERVAL_S = 0.2
CLOSE_TIMEOUT_S = 5.0


class RayReplica:
    """`await start(...)`, use `client`, `await close()`. All on one event loop, in a process connected to Ray."""

    def __init__(
        self,
        replica_id: str,
        config: EngineConfig,
        *,
        log_level: str = "WARNING",
        placement_timeout_s: float = PLACEMENT_TIMEOUT_S,
    ) -> None:
        self.replica_id = replica_id
        self._config = config
        self._log_level = log_level
        self._placement_timeout_s = placement_timeout_s
        self._group: PlacementGroup | None = None
        self._actors: list[ActorHandle] = []
        self._watchers: list[asyncio.Task[None]] = []
        self._closing = False
        self._client: ReplicaClient | None = None

    @property
    def client(self) -> ReplicaClient:
        assert self._client is not None, "start comes before client"
        return self._client

    async def start(self, *, on_phase: OnPhase = lambda _: None, on_progress: OnProgress = lambda _, __: None) -> Self:
        """Returns when rank 0 answers. On failure everything started is ended before the exception goes out.

        Raises ConfigError, CheckpointError and GroupError as the ranks do, ReplicaUnavailableError when a rank dies.
        """
        try:
            await self._start(on_phase, on_progress)
        except BaseException:
            await self.close()
            raise
        return self

    async def close(self) -> None:
        """Ends the ranks and gives their resources back. Idempotent."""
        self._closing = True
        for watcher in self._watchers:
            watcher.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)
        self._watchers.clear()
        if self._client is not None:
            await self._client.close()
        actors, self._actors = self._actors, []
        if actors:
            with contextlib.suppress(RayError, TimeoutError):
                async with asyncio.timeout(CLOSE_TIMEOUT_S):
                    await asyncio.gather(*(_await(a.close.remote()) for a in actors), return_exceptions=True)
        group, self._group = self._group, None
        await _within(CLOSE_TIMEOUT_S, lambda: _give_back(actors, group))

    async def _start(self, on_phase: OnPhase, on_progress: OnProgress) -> None:
        from workers.shard import Started

        size = self._config.tensor_parallel_size
        incarnation, token = secrets.token_hex(6), secrets.token_hex(32)
        on_phase("placing")
        nodes = await self._place()
        self._actors = [self._make_actor(rank, incarnation, token) for rank in range(size)]
        same_host = len(set(nodes.values())) == 1
        gateway_is_there = nodes[0] == ray.get_runtime_context().get_node_id()
        rank_0_ip = _node_ip(nodes[0])

        on_phase("joining")
        master = await self._on_rank(0, self._actors[0].address.remote("127.0.0.1" if same_host else rank_0_ip))
        await self._on_all(lambda actor: actor.join.remote(*master, same_host=same_host))

        on_phase("loading")
        poll = asyncio.create_task(self._poll_progress(on_progress))
        try:
            await self._on_all(lambda actor: actor.load.remote())
        finally:
            poll.cancel()

        on_phase("starting")
        host = "127.0.0.1" if gateway_is_there else rank_0_ip
        started = (await self._on_all(lambda actor: actor.start.remote(host)))[0]
        assert isinstance(started, Started), "rank 0 says where it serves"
        self._client = ReplicaClient(self.replica_id, (started.host, started.port), token)
        await self._client.connect()
        self._watchers = [asyncio.create_task(self._watch(rank)) for rank in range(size)]

    async def _place(self) -> dict[int, str]:
        """Reserves a bundle per rank, on one node if one has the room. Returns each rank's node id."""
        size = self._config.tensor_parallel_size
        bundle = {"CPU": 1.0, "GPU": 1.0} if self._config.device == "cuda" else {"CPU": 1.0}
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        fits_one = any(all(node.get(k, 0) >= v * size for k, v in bundle.items()) for node in nodes)
        group = self._group = placement_group(
            [bundle] * size, strategy="STRICT_PACK" if fits_one else "PACK", name=f"tramontane-{self.replica_id}"
        )
        deadline = time.monotonic() + self._placement_timeout_s
        # `ready()` would be a task, which takes a worker process of its own; the table is free.
        while (table := placement_group_table(group))["state"] != "CREATED":
            if time.monotonic() > deadline:
                raise ConfigError(self._missing(bundle))
            await asyncio.sleep(0.01)
        return {int(rank): node for rank, node in table["bundles_to_node_id"].items()}

    def _missing(self, bundle: dict[str, float]) -> str:
        size = self._config.tensor_parallel_size
        total, free = ray.cluster_resources(), ray.available_resources()
        lacks = [
            f"{size * amount:g} {name}, of which the cluster has {total.get(name, 0):g} and {free.get(name, 0):g} free"
            for name, amount in bundle.items()
            if free.get(name, 0) < size * amount
        ]
        needs = " and ".join(lacks) or f"{size} bundles of {bundle}, which no set of nodes has free"
        return f"Replica {self.replica_id} found no place in {self._placement_timeout_s:g} s: it needs {needs}."

    def _make_actor(self, rank: int, incarnation: str, token: str) -> ActorHandle:
        from workers.shard import ShardWorker

        options: dict[str, Any] = {
            "name": f"tramontane-{self.replica_id}-rank{rank}",
            "num_cpus": 1,
            "num_gpus": 1 if self._config.device == "cuda" else 0,
            "max_concurrency": 4,  # progress, wait and close while a phase runs
            "max_restarts": 0,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=rank),
        }
        return (
            ray.remote(ShardWorker)
            .options(**options)
            .remote(
                self._config,
                rank,
                replica_id=self.replica_id,
                incarnation=incarnation,
                token=token,
                log_level=self._log_level,
            )
        )

    async def _on_all(self, call: Callable[[ActorHandle], Awaitable[Any]]) -> list[Any]:
        """The call's results by rank. When one rank fails, the others are not waited for: they may wait for that one.

        Of several failures the first that says more than "another rank did not come" is raised.
        """
        tasks = [asyncio.create_task(self._on_rank(rank, call(actor))) for rank, actor in enumerate(self._actors)]
        try:
            return await asyncio.gather(*tasks)
        except GroupError:
            # Most likely the echo of another rank's failure, which says why; it is given a moment to arrive.
            await asyncio.wait(tasks, timeout=1.0)
            for task in tasks:
                if task.done() and (e := task.exception()) is not None and not isinstance(e, GroupError):
                    raise e from None
            raise
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _on_rank(self, rank: int, result: Awaitable[Any]) -> Any:
        try:
            return await _await(result)
        except RayTaskError as e:
            if isinstance(e.cause, TramontaneError):
                raise e.cause from None
            raise ReplicaUnavailableError(f"Rank {rank} of replica {self.replica_id} failed: {e.cause!r}.") from e
        except RayActorError as e:
            raise ReplicaUnavailableError(self._death(rank, e)) from e

    async def _poll_progress(self, on_progress: OnProgress) -> None:
        with contextlib.suppress(RayError):
            while True:
                await asyncio.sleep(PROGRESS_INTERVAL_S)
                reports = await asyncio.gather(*(_await(a.progress.remote()) for a in self._actors))
                on_progress(sum(done for done, _ in reports), sum(total for _, total in reports))

    async def _watch(self, rank: int) -> None:
        """Waits for the rank's end, and tells the client when it was not asked for."""
        try:
            reason = await _await(self._actors[rank].wait.remote())
        except RayActorError as e:
            reason = self._death(rank, e)
        except RayError as e:
            reason = f"Ray lost sight of rank {rank} of replica {self.replica_id}: {e}"
        if reason is not None and not self._closing:
            log.error("%s", reason)
            self.client.condemn(reason)

    def _death(self, rank: int, error: RayActorError) -> str:
        log.debug("Ray on rank %s of replica %s: %s", rank, self.replica_id, error)
        return f"Replica {self.replica_id} lost rank {rank}: its process died."


def _await(ref: Any) -> Coroutine[Any, Any, Any]:
    async def wait() -> Any:
        return await ref

    return wait()


def _give_back(actors: list[ActorHandle], group: PlacementGroup | None) -> None:
    for actor in actors:
        ray.kill(actor)
    if group is not None:
        remove_placement_group(group)


async def _within(timeout_s: float, work: Callable[[], None]) -> None:
    """Runs blocking work on a thread that nobody waits for beyond the timeout: Ray's calls hang when its control store is gone."""
    done = asyncio.Event()
    loop = asyncio.get_running_loop()

    def run() -> None:
        with contextlib.suppress(Exception):
            work()
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(done.set)

    threading.Thread(target=run, name="ray-close", daemon=True).start()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await done.wait()


def _node_ip(node_id: str) -> str:
    return next(node["NodeManagerAddress"] for node in ray.nodes() if node["NodeID"] == node_id)
