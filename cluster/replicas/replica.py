"""One replica as Ray runs it: a placement group with a bundle per rank, an actor in each, and their end.

Knows the phases of a replica's start and when a replica counts as lost; knows nothing of tokens, which travel through `client`. The
replica is the unit of failure: when one rank dies, the replica is over. Groups and actors are detached: they outlive the process that
made them, and `adopt` takes over what runs already.
"""

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn, Self

from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, get_placement_group

from cluster.protocol.view import RankRecord, ReplicaRecord, ReplicaState
from cluster.replicas.adapters import BringAdapters, ReplicaAdapters
from cluster.replicas.client import ReplicaClient
from cluster.replicas.gang import RankGang
from cluster.replicas.placement import node_ip, place
from workers.config import EngineConfig
from workers.errors import ReplicaUnavailableError, TramontaneError
from workers.protocol import LOADING_SILENCE_S
from workers.rank.reports import LoadProgress, RankDescription, RankStats, Rendezvous, Started
from workers.tracing.settings import TracingConfig

log = logging.getLogger(__name__)

POLL_INTERVAL_S = 0.2
STATS_INTERVAL_S = 2.0
LOST_AFTER_S = 1.0  # for a broken connection that does not come back
HANG_IS_DEATH_S = 10.0  # not ready for so long after it was: the ranks live but do not work
READY_TIMEOUT_S = 60.0
# Ray gives a process 60 s to report, and then starts another. Then it imports torch, which takes minutes from a slow disk.
MADE_WITHIN_S = 300.0
QUIET_S = 15.0  # so long a rank that starts may be silent before anybody is told


class RayReplica:
    """A `supervisor.ManagedReplica`. All on one event loop, in a process connected to Ray.

    deployment: the name in front of everything this makes in Ray. bring_adapters: called before it is ready; None where the engine has no
    adapters. on_change: called when `record` has changed.
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
        tracing: TracingConfig | None = None,
        placement_timeout_s: float | None = None,
        bring_adapters: BringAdapters | None = None,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self.replica_id = replica_id
        self._config = config
        self._single_host = single_host
        self._log_level = log_level
        self._tracing = tracing
        self._placement_timeout_s = placement_timeout_s
        self._bring_adapters = bring_adapters
        self._on_change = on_change
        incarnation = incarnation or secrets.token_hex(3)
        self._name = f"{deployment}-{replica_id}-{incarnation}"
        self._record = ReplicaRecord(
            replica_id=replica_id, incarnation=incarnation, state=ReplicaState.PLACING, started_at=time.time()
        )
        self._gang = RankGang(replica_id, self._name, on_end=self._note_death)
        self.adapters = ReplicaAdapters(self._gang)
        self._group: PlacementGroup | None = None
        self._poll: asyncio.Task[None] | None = None
        self._closing = False
        self._death: str | None = None
        self._unwell_since: float | None = None
        self._client: ReplicaClient | None = None

    def record(self) -> ReplicaRecord:
        record = replace(self._record, adapters=tuple(sorted(self.adapters.held)))
        return record if self._client is None else replace(record, load=self._client.load)

    async def start(self) -> None:
        """Returns after the first forward pass on all ranks. After a failure, the caller cleans up with `close`.

        Raises ConfigError, CheckpointError and GroupError as the ranks do, ReplicaUnavailableError when a rank dies.
        """
        try:
            await self._start()
        except ReplicaUnavailableError as e:
            if self._death is None:
                raise
            raise ReplicaUnavailableError(self._death) from e

    async def _start(self) -> None:
        token = secrets.token_hex(32)
        nodes = await self._place()
        assert self._group is not None, "place has reported it"
        self._gang.create(
            self._config,
            self._group,
            incarnation=self._record.incarnation,
            token=token,
            log_level=self._log_level,
            tracing=self._tracing,
        )
        ips = {rank: node_ip(node) for rank, node in nodes.items()}
        ranks = [self._rank_record(rank, nodes[rank], ips[rank]) for rank in sorted(nodes)]
        self._note(state=ReplicaState.STARTING, phase="joining", reason=None, ranks=tuple(ranks))

        # Calls wait for their actor.
        await self._signs_of_life(within_s=MADE_WITHIN_S)
        await self._watched(self._start_ranks(nodes, ips, token))

    async def _start_ranks(self, nodes: Mapping[int, str], ips: Mapping[int, str], token: str) -> None:
        """From ranks that are there to a replica that is ready. nodes: of each rank, ips: their addresses."""
        several_hosts = len(set(nodes.values())) > 1
        meeting: Rendezvous = await self._gang.call(0, "address", ips[0] if several_hosts else "127.0.0.1")
        await self._gang.call_all("join", meeting, same_host=not several_hosts)

        descriptions: list[RankDescription] = await self._gang.call_all("describe")
        ranks = [replace(r, pid=d.pid) for r, d in zip(self._record.ranks, descriptions, strict=True)]
        self._note(phase="loading", ranks=tuple(ranks))
        await self._gang.call_all("load")
        # Most of them now, while nothing waits for this replica, and below those that came in the meantime.
        await self._adapters_are_here()

        self._note(phase="starting")
        started: Started = (await self._gang.call_all("start", "127.0.0.1" if self._single_host else ips[0]))[0]
        self._note(address=(started.host, started.port), token=token, facts=started.facts)
        await self._connect()
        await self._until_ready()
        await self._adapters_are_here()
        self._note(state=ReplicaState.READY, phase=None, reason=None)

    async def adopt(self, descriptions: Sequence[RankDescription]) -> Self:
        """Takes over running ranks, given their own descriptions in rank order. Raises ReplicaUnavailableError."""
        size = self._config.tensor_parallel_size
        if [d.rank for d in descriptions] != list(range(size)) or any(d.phase != "serving" for d in descriptions):
            raise ReplicaUnavailableError(f"Replica {self.replica_id} was found with ranks missing or not serving.")
        for suffix in ("", "-apart"):
            with contextlib.suppress(ValueError):
                self._group = get_placement_group(self._name + suffix)
        self._gang.find(size)
        ranks = []
        for d in descriptions:
            assert d.node_id is not None, "ranks under Ray know their node"
            ranks.append(replace(self._rank_record(d.rank, d.node_id, node_ip(d.node_id)), pid=d.pid))
        lead = descriptions[0]
        self._note(address=lead.address, token=lead.token, facts=lead.facts, ranks=tuple(ranks))
        await self._connect()
        if self._bring_adapters is not None:
            await self.adapters.ask()
        self._note(state=ReplicaState.READY)
        return self

    @property
    def client(self) -> ReplicaClient:
        assert self._client is not None, "start comes before client"
        return self._client

    def lost_reason(self, now: float) -> str | None:
        """See ManagedReplica. Dead ranks count at once, broken connections and hangs after a while in which they may recover."""
        client = self.client
        if over := self._death or client.condemned:
            return over
        reason = client.not_ready_reason(now)
        if reason is None:
            self._unwell_since = None
            return None
        if self._unwell_since is None:
            self._unwell_since = now
        patience_s = HANG_IS_DEATH_S if client.connected else LOST_AFTER_S
        return reason if now - self._unwell_since > patience_s else None

    async def close(self, reason: str | None) -> None:
        """Ends the ranks, in order unless the replica is lost, and gives their resources back. Idempotent."""
        self._closing = True
        if self._poll is not None:
            self._poll.cancel()
            await asyncio.gather(self._poll, return_exceptions=True)
            self._poll = None
        client = self._client
        answers = client is not None and client.connected and client.is_ready(time.monotonic())
        if client is not None:
            await client.close()
        group, self._group = self._group, None
        await self._gang.close(group, answers=answers and self._death is None)

    async def _adapters_are_here(self) -> None:
        """The replica holds all that the registry says, until the event loop's next step."""
        if self._bring_adapters is not None:
            await self._bring_adapters(self.adapters)

    async def _place(self) -> dict[int, str]:
        def note_group(group: PlacementGroup) -> None:
            self._group = group

        return await place(
            self._name,
            self._config,
            timeout_s=self._placement_timeout_s,
            on_group=note_group,
            on_waiting=lambda reason: self._note(reason=f"Replica {self.replica_id} waits for resources. {reason}"),
        )

    async def _connect(self) -> None:
        assert self._record.address is not None and self._record.token is not None
        self._client = ReplicaClient(self.replica_id, self._record.address, self._record.token)
        await self._client.connect()
        self._poll = asyncio.create_task(self._poll_stats())

    async def _until_ready(self) -> None:
        deadline = time.monotonic() + READY_TIMEOUT_S
        while (reason := self.client.not_ready_reason(time.monotonic())) is not None:
            if self.client.condemned or self._death or time.monotonic() > deadline:
                raise ReplicaUnavailableError(reason)
            await asyncio.sleep(0.02)

    def _rank_record(self, rank: int, node_id: str, ip: str) -> RankRecord:
        return RankRecord(rank=rank, node_id=node_id, node_ip=ip, actor_name=self._gang.actor_name(rank))

    def _note(self, **changes: Any) -> None:
        self._record = replace(self._record, **changes)
        self._on_change()

    def _note_death(self, reason: str) -> None:
        if self._closing:
            return
        condemned = None if self._client is None else self._client.condemned
        self._death = self._death or condemned or reason
        if self._client is not None:
            self._client.condemn(self._death)
        self._on_change()

    async def _watched(self, work: Coroutine[Any, Any, None]) -> None:
        """Does it while the ranks say how far they are. Raises ReplicaUnavailableError if one of them no longer does.

        A rank that is alone in its replica has no other one that notices that it is frozen.
        """
        doing = asyncio.create_task(work)
        watch = asyncio.create_task(self._watch_progress())
        try:
            await asyncio.wait((doing, watch), return_when=asyncio.FIRST_COMPLETED)
            await (doing if doing.done() else watch)
        finally:
            doing.cancel()
            watch.cancel()
            await asyncio.gather(doing, watch, return_exceptions=True)

    async def _watch_progress(self) -> NoReturn:
        while True:
            await asyncio.sleep(POLL_INTERVAL_S)
            parts = await self._signs_of_life(within_s=LOADING_SILENCE_S)
            if self._record.phase == "loading" and parts is not None:
                self._note(progress=(sum(p.num_bytes_read for p in parts), sum(p.num_bytes_total for p in parts)))

    async def _signs_of_life(self, *, within_s: float) -> list[LoadProgress] | None:
        """How far each rank is; None if one has ended, which what the ranks work on reports. Raises ReplicaUnavailableError naming those
        that do not say it.
        """
        size = self._config.tensor_parallel_size
        calls = [asyncio.create_task(self._gang.call(rank, "progress")) for rank in range(size)]
        quiet_s = min(QUIET_S, within_s)
        try:
            _, silent = await asyncio.wait(calls, timeout=quiet_s)
            if silent:
                self._note(reason=f"{self._silence(calls, quiet_s)} It is replaced after {within_s:g} s.")
                _, silent = await asyncio.wait(calls, timeout=within_s - quiet_s)
                if silent:
                    raise ReplicaUnavailableError(self._silence(calls, within_s))
                self._note(reason=None)
        finally:
            for call in calls:
                call.cancel()
            answers = await asyncio.gather(*calls, return_exceptions=True)
        if any(isinstance(answer, RayError | TramontaneError) for answer in answers):
            return None
        return [call.result() for call in calls]

    def _silence(self, calls: Sequence[asyncio.Task[LoadProgress]], silence_s: float) -> str:
        ranks = ", ".join(str(rank) for rank, call in enumerate(calls) if not call.done())
        return f"Replica {self.replica_id} starts, and rank {ranks} has given no sign of life for {silence_s:g} s."

    async def _poll_stats(self) -> None:
        while True:
            with contextlib.suppress(RayError, TramontaneError):  # the gang reports a rank that has died
                stats: list[RankStats] = await self._gang.call_all("stats")
                ranks = [replace(r, stats=s) for r, s in zip(self._record.ranks, stats, strict=True)]
                self._record = replace(self._record, ranks=tuple(ranks))
            await asyncio.sleep(STATS_INTERVAL_S)
