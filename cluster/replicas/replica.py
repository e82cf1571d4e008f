"""One replica as Ray runs it: a placement group with a bundle per rank, an actor in each, and their end.

Knows Ray and the phases of `workers.rank.worker.ShardWorker`; knows nothing of tokens, which travel through `client`. The replica
is the unit of failure: when one rank dies, the replica is over. Groups and actors are detached: they outlive the process that made
them, and `adopt` takes up where another left off.
"""

import asyncio
import contextlib
import logging
import secrets
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, get_placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.protocol.view import RankRecord, RankStats, ReplicaRecord, ReplicaState
from cluster.replicas.client import ReplicaClient
from cluster.replicas.placement import bundle_of, node_ip, place
from workers.config import EngineConfig
from workers.errors import GroupError, ReplicaUnavailableError, TramontaneError

log = logging.getLogger(__name__)

POLL_INTERVAL_S = 0.2
STATS_INTERVAL_S = 2.0
CLOSE_TIMEOUT_S = 5.0
LOST_AFTER_S = 1.0  # a connection that broke and does not come back
HANG_IS_DEATH_S = 10.0  # not ready for so long after it was: ranks that live but do not work
READY_TIMEOUT_S = 60.0
LAST_WORDS_S = 0.1
WATCH_CALL_S = 10.0


class RayReplica:
    """A `supervisor.ManagedReplica`. All on one event loop, in a process connected to Ray.

    deployment: the name in front of everything this makes in Ray. on_change: called when `record` says something new.
    """

    def __init__(
        self,
        replica_id: str,
        config: EngineConfig,
        *,
        deployment: str,
        incarnation: str | None = None,
        single_host: bool = False,
        log_level: str = "WARNING",
        placement_timeout_s: float | None = None,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self.replica_id = replica_id
        self._config = config
        self._single_host = single_host
        self._log_level = log_level
        self._placement_timeout_s = placement_timeout_s
        self._on_change = on_change
        incarnation = incarnation or secrets.token_hex(3)
        self._name = f"{deployment}-{replica_id}-{incarnation}"
        self._record = ReplicaRecord(
            replica_id=replica_id, incarnation=incarnation, state=ReplicaState.PLACING, started_at=time.time()
        )
        self._group: PlacementGroup | None = None
        self._actors: list[ActorHandle] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._closing = False
        self._death: str | None = None
        self._unwell_since: float | None = None
        self._client: ReplicaClient | None = None

    def record(self) -> ReplicaRecord:
        if self._client is None:
            return self._record
        return replace(self._record, load=self._client.load)

    async def start(self) -> None:
        """Returns after the first forward pass on all ranks. The caller ends what a failure leaves, with `close`.

        Raises ConfigError, CheckpointError and GroupError as the ranks do, ReplicaUnavailableError when a rank dies.
        """
        from workers.rank.worker import Started

        size = self._config.tensor_parallel_size
        token = secrets.token_hex(32)
        nodes = await place(
            self._name,
            self._config,
            timeout_s=self._placement_timeout_s,
            on_group=self._set_group,
            on_waiting=lambda reason: self._note(reason=f"Replica {self.replica_id} waits for a place. {reason}"),
        )
        self._actors = [self._make_actor(rank, token) for rank in range(size)]
        self._tasks = [asyncio.create_task(self._watch(rank)) for rank in range(size)]
        ips = {rank: node_ip(node) for rank, node in nodes.items()}
        self._note(
            state=ReplicaState.STARTING,
            phase="joining",
            reason=None,
            ranks=tuple(
                RankRecord(rank=rank, node_id=nodes[rank], node_ip=ips[rank], actor_name=self._actor_name(rank))
                for rank in range(size)
            ),
        )
        several_hosts = len(set(nodes.values())) > 1
        master = await self._on_rank(0, self._actors[0].address.remote(ips[0] if several_hosts else "127.0.0.1"))
        await self._on_all(lambda actor: actor.join.remote(*master, same_host=not several_hosts))

        pids = [d["pid"] for d in await self._on_all(lambda actor: actor.describe.remote())]
        ranks = tuple(replace(r, pid=pid) for r, pid in zip(self._record.ranks, pids, strict=True))
        self._note(phase="loading", ranks=ranks)
        poll = asyncio.create_task(self._poll_progress())
        try:
            await self._on_all(lambda actor: actor.load.remote())
        finally:
            poll.cancel()

        self._note(phase="starting")
        host = "127.0.0.1" if self._single_host else ips[0]
        started = (await self._on_all(lambda actor: actor.start.remote(host)))[0]
        assert isinstance(started, Started), "rank 0 says where it serves"
        self._note(address=(started.host, started.port), token=token, facts=started.facts)
        await self._connect()
        deadline = time.monotonic() + READY_TIMEOUT_S
        while (reason := self.client.not_ready_reason(time.monotonic())) is not None:
            if self.client.condemned or self._death or time.monotonic() > deadline:
                raise ReplicaUnavailableError(self._death or reason)
            await asyncio.sleep(0.02)
        self._note(state=ReplicaState.READY, phase=None)

    async def adopt(self, descriptions: Sequence[Mapping[str, Any]]) -> Self:
        """Takes over running ranks, given what each says of itself (`ShardWorker.describe`), by rank. Raises ReplicaUnavailableError."""
        size = self._config.tensor_parallel_size
        if [d["rank"] for d in descriptions] != list(range(size)) or any(d["phase"] != "serving" for d in descriptions):
            raise ReplicaUnavailableError(f"Replica {self.replica_id} was found with ranks missing or not serving.")
        for suffix in ("", "-apart"):
            with contextlib.suppress(ValueError):
                self._group = get_placement_group(self._name + suffix)
        self._actors = [ray.get_actor(self._actor_name(rank)) for rank in range(size)]
        self._tasks = [asyncio.create_task(self._watch(rank)) for rank in range(size)]
        lead = descriptions[0]
        ranks = [
            RankRecord(
                pid=d["pid"],
                rank=d["rank"],
                node_id=d["node_id"],
                node_ip=node_ip(d["node_id"]),
                actor_name=self._actor_name(d["rank"]),
            )
            for d in descriptions
        ]
        self._note(address=tuple(lead["address"]), token=lead["token"], facts=lead["facts"], ranks=tuple(ranks))
        await self._connect()
        self._note(state=ReplicaState.READY)
        return self

    @property
    def client(self) -> ReplicaClient:
        assert self._client is not None, "start comes before client"
        return self._client

    def lost_reason(self, now: float) -> str | None:
        """See ManagedReplica. Dead ranks at once, broken connections and hangs after a moment in which they may recover."""
        client = self.client
        if over := self._death or client.condemned:
            return over
        reason = client.not_ready_reason(now)
        if reason is None:
            self._unwell_since = None
            return None
        if self._unwell_since is None:
            self._unwell_since = now
        patience = HANG_IS_DEATH_S if client.connected else LOST_AFTER_S
        return reason if now - self._unwell_since > patience else None

    async def close(self, reason: str | None) -> None:
        """Ends the ranks, politely unless the replica is lost, and gives their resources back. Idempotent."""
        self._closing = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        client = self._client
        # Asked of a replica that does not answer, politeness costs its successor the time it waits for the place.
        answers = client is not None and client.connected and client.is_ready(time.monotonic())
        if client is not None:
            await client.close()
        actors, self._actors = self._actors, []
        if actors and self._death is None and answers:
            with contextlib.suppress(RayError, TimeoutError):
                async with asyncio.timeout(CLOSE_TIMEOUT_S):
                    await asyncio.gather(*(_await(a.close.remote()) for a in actors), return_exceptions=True)
        group, self._group = self._group, None
        await within(CLOSE_TIMEOUT_S, lambda: _give_back(actors, group))

    async def _connect(self) -> None:
        assert self._record.address is not None and self._record.token is not None
        self._client = ReplicaClient(self.replica_id, self._record.address, self._record.token)
        await self._client.connect()
        self._tasks.append(asyncio.create_task(self._poll_stats()))

    def _set_group(self, group: PlacementGroup) -> None:
        self._group = group

    def _note(self, **changes: Any) -> None:
        self._record = replace(self._record, **changes)
        self._on_change()

    def _actor_name(self, rank: int) -> str:
        return f"{self._name}-rank{rank}"

    def _make_actor(self, rank: int, token: str) -> ActorHandle:
        from cluster.replicas.rank_actor import RankActor

        bundle = bundle_of(self._config)
        options: dict[str, Any] = {
            "name": self._actor_name(rank),
            "lifetime": "detached",
            "num_cpus": bundle["CPU"],
            "num_gpus": bundle.get("GPU", 0),
            "max_concurrency": 16,  # has_ended, progress, stats and close while a phase runs, some for a controller that died
            "max_restarts": 0,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=rank),
        }
        return (
            ray.remote(RankActor)
            .options(**options)
            .remote(
                self._config,
                rank,
                replica_id=self.replica_id,
                incarnation=self._record.incarnation,
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
            raise ReplicaUnavailableError(self._death or self._death_of(rank, e)) from e

    async def _poll_progress(self) -> None:
        with contextlib.suppress(RayError):
            while True:
                await asyncio.sleep(POLL_INTERVAL_S)
                reports = await asyncio.gather(*(_await(a.progress.remote()) for a in self._actors))
                self._note(progress=(sum(done for done, _ in reports), sum(total for _, total in reports)))

    async def _poll_stats(self) -> None:
        while True:
            with contextlib.suppress(RayError):  # a rank that is gone is `_watch`'s business
                stats = await asyncio.gather(*(_await(a.stats.remote()) for a in self._actors))
                ranks = [replace(r, stats=RankStats(**s)) for r, s in zip(self._record.ranks, stats, strict=True)]
                self._record = replace(self._record, ranks=tuple(ranks))
            await asyncio.sleep(STATS_INTERVAL_S)

    async def _watch(self, rank: int) -> None:
        """Waits for the rank's end, and notes it when it was not asked for."""
        try:
            ended, reason = False, None
            while not ended:
                ended, reason = await _await(self._actors[rank].has_ended.remote(WATCH_CALL_S))
        except RayActorError as e:
            reason = self._death_of(rank, e)
            await asyncio.sleep(LAST_WORDS_S)  # the others' own words name the rank that went first
        except RayError as e:
            reason = f"Ray lost sight of rank {rank} of replica {self.replica_id}: {e}"
        if reason is None or self._closing:
            return
        condemned = None if self._client is None else self._client.condemned
        self._death = self._death or condemned or reason
        if self._client is not None:
            self._client.condemn(self._death)
        self._on_change()

    def _death_of(self, rank: int, error: RayActorError) -> str:
        log.debug("Ray on rank %s of replica %s: %s", rank, self.replica_id, error)
        return f"Replica {self.replica_id} lost rank {rank}: its process died."


def _await(ref: Any) -> Coroutine[Any, Any, Any]:
    async def wait() -> Any:
        return await ref

    return wait()


def _give_back(actors: Sequence[ActorHandle], group: PlacementGroup | None) -> None:
    for actor in actors:
        with contextlib.suppress(RayError, ValueError):  # gone already; the others and the group are not
            ray.kill(actor)
    if group is not None:
        remove_placement_group(group)


async def within(timeout_s: float, work: Callable[[], object]) -> None:
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
