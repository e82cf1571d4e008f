"""The actors of one replica's ranks: created or found by name, called by rank, watched and ended.

Knows Ray actors and what their failures mean; knows no placement, no gateways and no order of calls. The actors are detached: they outlive
the process that made them. When one rank ends, so does the replica, but that is decided elsewhere.
"""

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.replicas.placement import bundle_of
from workers.config import EngineConfig
from workers.errors import GroupError, ReplicaUnavailableError, TramontaneError
from workers.rank.reports import RankEnd
from workers.tracing.settings import TracingConfig

log = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 5.0
ECHO_S = 1.0  # after a GroupError: the rank whose failure caused it may still report the reason
LAST_WORDS_S = 0.1
WATCH_CALL_S = 10.0


class RankGang:
    """One replica's ranks. `name` comes before the rank in each actor's name.

    on_end(reason): called for every rank that ends without being closed.
    """

    def __init__(self, replica_id: str, name: str, *, on_end: Callable[[str], None]) -> None:
        self.replica_id = replica_id
        self._name = name
        self._on_end = on_end
        self._actors: list[ActorHandle] = []
        self._watches: list[asyncio.Task[None]] = []
        self._closing = False

    def actor_name(self, rank: int) -> str:
        return f"{self._name}-rank{rank}"

    def create(
        self,
        config: EngineConfig,
        group: PlacementGroup,
        *,
        incarnation: str,
        token: str,
        log_level: str,
        tracing: TracingConfig | None = None,
    ) -> None:
        """Starts an actor in each bundle of the placement group, and watches them."""
        from cluster.replicas.rank_actor import RankActor

        bundle = bundle_of(config)
        for rank in range(config.tensor_parallel_size):
            options: dict[str, Any] = {
                "name": self.actor_name(rank),
                "lifetime": "detached",
                "num_cpus": bundle["CPU"],
                "num_gpus": bundle.get("GPU", 0),
                # has_ended, progress, stats and close while a phase runs; some of them called by a controller that died
                "max_concurrency": 16,
                "max_restarts": 0,
                "scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank),
            }
            actor = ray.remote(RankActor).options(**options)
            identity = {"replica_id": self.replica_id, "incarnation": incarnation, "token": token}
            self._actors.append(actor.remote(config, rank, **identity, log_level=log_level, tracing=tracing))
        self._watch_all()

    def find(self, size: int) -> None:
        """Finds the running actors by their names, and watches them. Raises ValueError for one that is not there."""
        self._actors = [ray.get_actor(self.actor_name(rank)) for rank in range(size)]
        self._watch_all()

    async def call(self, rank: int, method: str, *arguments: Any, **options: Any) -> Any:
        """The method's result. Raises what the rank raised, if it is a TramontaneError; else ReplicaUnavailableError."""
        try:
            return await _await(getattr(self._actors[rank], method).remote(*arguments, **options))
        except RayTaskError as e:
            if isinstance(e.cause, TramontaneError):
                raise e.cause from None
            raise ReplicaUnavailableError(f"Rank {rank} of replica {self.replica_id} failed: {e.cause!r}.") from e
        except RayActorError as e:
            raise ReplicaUnavailableError(self._lost(rank, e)) from e

    async def call_all(self, method: str, *arguments: Any, **options: Any) -> list[Any]:
        """The results by rank. When one rank fails, the others are not waited for: they may wait for that rank.

        Of several failures, the first that says more than "another rank did not come" is raised.
        """
        tasks = [
            asyncio.create_task(self.call(rank, method, *arguments, **options)) for rank in range(len(self._actors))
        ]
        try:
            return await asyncio.gather(*tasks)
        except GroupError:
            # Most likely a consequence of another rank's failure, which says why and may arrive a moment later.
            await asyncio.wait(tasks, timeout=ECHO_S)
            for task in tasks:
                if task.done() and (e := task.exception()) is not None and not isinstance(e, GroupError):
                    raise e from None
            raise
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def close(self, group: PlacementGroup | None, *, answers: bool) -> None:
        """Ends the actors and removes the placement group. Idempotent, never raises.

        answers: whether the ranks still work, so that they can be closed in order. Waiting for a replica that does not answer would
        only delay its successor, which needs the same resources.
        """
        self._closing = True
        watches, self._watches = self._watches, []
        for task in watches:
            task.cancel()
        await asyncio.gather(*watches, return_exceptions=True)
        actors, self._actors = self._actors, []
        if actors and answers:
            with contextlib.suppress(RayError, TimeoutError):
                async with asyncio.timeout(CLOSE_TIMEOUT_S):
                    await asyncio.gather(*(_await(a.close.remote()) for a in actors), return_exceptions=True)

        def give_back() -> None:
            for actor in actors:
                with contextlib.suppress(RayError, ValueError):  # already dead; the others and the group may not be
                    ray.kill(actor)
            if group is not None:
                remove_placement_group(group)

        await run_within(CLOSE_TIMEOUT_S, give_back)

    def _watch_all(self) -> None:
        self._watches = [asyncio.create_task(self._watch(rank)) for rank in range(len(self._actors))]

    async def _watch(self, rank: int) -> None:
        try:
            end = RankEnd(has_ended=False)
            while not end.has_ended:
                end = await _await(self._actors[rank].has_ended.remote(WATCH_CALL_S))
            reason = end.reason
        except RayActorError as e:
            reason = self._lost(rank, e)
            await asyncio.sleep(LAST_WORDS_S)  # the other ranks' own reasons name the rank that ended first
        except RayError as e:
            reason = f"Ray lost sight of rank {rank} of replica {self.replica_id}: {e}"
        if reason is not None and not self._closing:
            self._on_end(reason)

    def _lost(self, rank: int, error: RayActorError) -> str:
        log.debug("Ray on rank %s of replica %s: %s", rank, self.replica_id, error)
        return f"Replica {self.replica_id} lost rank {rank}: its process died."


def _await(ref: Any) -> Coroutine[Any, Any, Any]:
    async def wait() -> Any:
        return await ref

    return wait()


async def run_within(timeout_s: float, work: Callable[[], object]) -> None:
    """Runs blocking work on a thread, and stops waiting for it after `timeout_s`: Ray's calls hang when its control store is down."""
    done = asyncio.Event()
    loop = asyncio.get_running_loop()

    def run() -> None:
        with contextlib.suppress(Exception):
            work()
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(done.set)

    threading.Thread(target=run, name="ray-close", daemon=True).start()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await done.wait()
