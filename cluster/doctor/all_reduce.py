"""A real all-reduce where a replica would run: starts ranks in a placement group, joins them as for serving, and measures.

Knows Ray, placement and the phases of `workers.rank.probe.ProbeRank`. Uses only free resources; if there are not enough, it reports
what the running replicas measured of their own all-reduces instead.
"""

import asyncio
import contextlib
import re
import secrets
from collections.abc import Sequence
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util import list_named_actors
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.doctor.facts import AllReduceFailure, AllReduceResult, AllReduceSkipped, PendingRank, RunningReplica
from cluster.replicas.placement import Gang, bundle_of, missing_for, node_ip, place
from workers.errors import ConfigError, GroupError

PLACEMENT_TIMEOUT_S = 15.0  # longer than placement waits for a single host to become free
START_S = 60.0  # to import torch from a cold disk
ECHO_S = 1.0  # after the first failure: other ranks may report more about it
# Fractions of the time limit of one collective.
NCCL_PATIENCE, CPU_PATIENCE = 0.8, 2.0
ASK_S = 3.0  # for an answer from a rank that may hang
# The replicas of one of several deployments have its name in theirs: see cluster/protocol/names.py.
_RANK = re.compile(
    r"(?P<deployment>[^.]+(\.(?P<member>.+))?)-(?P<replica>(?(member)(?P=member)-|)r\d+)-[0-9a-f]+-rank(?P<rank>\d+)"
)


async def try_all_reduce(
    gang: Gang, *, spread: bool, timeout_s: float
) -> AllReduceResult | AllReduceFailure | AllReduceSkipped:
    """Starts the ranks, measures, and removes them again. Leaves nothing in Ray.

    spread: each rank on a node of its own. timeout_s: limit for the ranks to join, and for each collective.
    """
    if (reason := await asyncio.to_thread(missing_for, gang, spread=spread)) is not None:
        return AllReduceSkipped(reason=reason, running=tuple(await running_replicas()))
    trial = _Trial(gang, spread=spread, timeout_s=timeout_s)
    try:
        return await trial.run()
    except ConfigError as e:  # the resources were taken in the meantime
        return AllReduceSkipped(reason=str(e), running=tuple(await running_replicas()))
    finally:
        trial.close()


def start_ranks(gang: Gang, *, group: PlacementGroup, name: str, token: str, timeout_s: float) -> list[ActorHandle]:
    """Starts a ProbeRank in each bundle of the placement group; returns them by rank."""
    from workers.rank.probe import ProbeRank

    bundle, actors = bundle_of(gang), []
    for rank in range(gang.tensor_parallel_size):
        strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank)
        actor = ray.remote(ProbeRank).options(
            num_cpus=bundle["CPU"],
            num_gpus=bundle.get("GPU", 0),
            max_concurrency=4,  # so that `where` answers while another call hangs
            max_restarts=0,
            scheduling_strategy=strategy,
        )
        options = {"size": gang.tensor_parallel_size, "device": gang.device, "name": name, "token": token}
        actors.append(actor.remote(rank, **options, timeout_s=timeout_s))
    return actors


class _RankError(Exception):
    """The most informative failure of a rank. `unfinished`: the ranks whose calls had not finished by then."""

    def __init__(self, message: str, *, suspects: tuple[int, ...], unfinished: list[int]) -> None:
        super().__init__(message)
        self.suspects = suspects
        self.unfinished = unfinished


class _Trial:
    def __init__(self, gang: Gang, *, spread: bool, timeout_s: float) -> None:
        self._gang = gang
        self._spread = spread
        self._timeout_s = timeout_s
        self._name = f"doctor-{secrets.token_hex(3)}"
        self._groups: list[PlacementGroup] = []
        self._actors: list[ActorHandle] = []

    async def run(self) -> AllReduceResult | AllReduceFailure:
        nodes = await place(
            self._name,
            self._gang,
            timeout_s=PLACEMENT_TIMEOUT_S,
            on_group=self._groups.append,
            on_waiting=lambda _: None,
            spread=self._spread,
            detached=False,
        )
        ips = tuple(node_ip(nodes[rank]) for rank in range(self._gang.tensor_parallel_size))
        self._actors = start_ranks(
            self._gang,
            group=self._groups[-1],
            name=self._name,
            token=secrets.token_hex(32),
            timeout_s=self._timeout_s,
        )
        several_hosts = len(set(nodes.values())) > 1
        try:
            host = ips[0] if several_hosts else "127.0.0.1"
            rendezvous = await self._on_ranks([self._actors[0]], "address", host, timeout_s=START_S)
            joined = await self._on_ranks(
                self._actors, "join", rendezvous[0], same_host=not several_hosts, timeout_s=START_S + self._timeout_s
            )
            # On the CPU a collective that times out raises. NCCL's watchdog ends the process instead, so on GPUs the ranks are asked
            # earlier which ranks they wait for.
            patience = NCCL_PATIENCE if self._gang.device == "cuda" else CPU_PATIENCE
            measured = await self._on_ranks(self._actors, "measure", timeout_s=patience * self._timeout_s)
            await self._on_ranks(self._actors, "close", timeout_s=ASK_S)
        except _RankError as e:
            waiting = await asyncio.gather(*(self._where(rank) for rank in e.unfinished))
            return AllReduceFailure(ranks=ips, failure=str(e), suspects=e.suspects, waiting=tuple(waiting))
        return AllReduceResult(
            ranks=ips,
            collectives=joined[0].collectives,
            interface=joined[0].gloo_interface,
            latency_s=max(m.latency_s for m in measured),
            bus_bytes_per_s=min(m.bus_bytes_per_s for m in measured),
        )

    def close(self) -> None:
        for actor in self._actors:
            with contextlib.suppress(RayError, ValueError):
                ray.kill(actor)
        for group in self._groups[-1:]:  # `place` has removed the earlier ones
            remove_placement_group(group)

    async def _on_ranks(
        self, actors: Sequence[ActorHandle], method: str, *arguments: Any, timeout_s: float, **options: Any
    ) -> list[Any]:
        """The results by rank. Raises _RankError as soon as a rank fails, or after `timeout_s`."""
        tasks = [asyncio.ensure_future(_await(getattr(a, method).remote(*arguments, **options))) for a in actors]
        try:
            done, pending = await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_EXCEPTION)
            if pending and any(task.exception() for task in done):
                done, pending = await asyncio.wait(tasks, timeout=ECHO_S)
            unfinished = [rank for rank, task in enumerate(tasks) if task in pending]
            failures = {
                rank: e for rank, task in enumerate(tasks) if task in done and (e := task.exception()) is not None
            }
            if not failures and not pending:
                return [task.result() for task in tasks]
            if not failures:
                message = f"{method!r} did not finish within {timeout_s:g} s"
                raise _RankError(message, suspects=(), unfinished=unfinished)
            # A failure that names other ranks says more than one that only says that something broke.
            rank = max(failures, key=lambda r: len(_suspects(failures[r])))
            message = _describe_failure(rank, failures[rank])
            raise _RankError(message, suspects=_suspects(failures[rank]), unfinished=unfinished)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _where(self, rank: int) -> PendingRank:
        with contextlib.suppress(RayError, TimeoutError):
            async with asyncio.timeout(ASK_S):
                where = await self._actors[rank].where.remote()
                return PendingRank(rank=rank, doing=where.doing, waiting_for=where.waiting_for)
        return PendingRank(rank=rank, doing="does not answer at all")


async def running_replicas() -> list[RunningReplica]:
    """The all-reduces that each deployment's replicas on this cluster have measured. Replicas that do not answer are left out."""
    found: dict[tuple[str, str, str], dict[int, ActorHandle]] = {}
    for entry in list_named_actors(all_namespaces=True):
        if (match := _RANK.fullmatch(entry["name"])) is not None:
            with contextlib.suppress(ValueError):
                actor = ray.get_actor(entry["name"], namespace=entry["namespace"])
                key = entry["namespace"], match["deployment"], match["replica"]
                found.setdefault(key, {})[int(match["rank"])] = actor
    answers = await asyncio.gather(*(_ask_replica(*key[1:], ranks) for key, ranks in sorted(found.items())))
    return [answer for answer in answers if answer is not None]


async def _ask_replica(deployment: str, replica_id: str, ranks: dict[int, ActorHandle]) -> RunningReplica | None:
    with contextlib.suppress(RayError, TimeoutError):
        async with asyncio.timeout(ASK_S):
            actors = [ranks[rank] for rank in sorted(ranks)]
            descriptions = await asyncio.gather(*(_await(actor.describe.remote()) for actor in actors))
            stats = await actors[0].stats.remote()
            count, seconds = stats.num_all_reduces_total, stats.all_reduce_s_total
            return RunningReplica(
                deployment=deployment,
                replica_id=replica_id,
                ranks=tuple(node_ip(description.node_id) for description in descriptions),
                num_all_reduces=count,
                mean_s=seconds / count if count and seconds is not None else None,
            )
    return None


async def _await(ref: Any) -> Any:
    return await ref


def _suspects(error: BaseException) -> tuple[int, ...]:
    cause = error.cause if isinstance(error, RayTaskError) else error
    return cause.ranks if isinstance(cause, GroupError) else ()


def _describe_failure(rank: int, error: BaseException) -> str:
    if isinstance(error, RayTaskError):
        return str(error.cause) if isinstance(error.cause, GroupError) else f"Rank {rank}: {error.cause!r}"
    if isinstance(error, RayActorError):
        return f"The process of rank {rank} died"
    return f"Rank {rank}: {error!r}"
