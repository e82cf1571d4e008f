"""Records the steps of one replica through the actors of its ranks, and fetches what each of them has recorded.

Knows Ray's actors and the machines' clocks; knows no file and no gateway. The replica's owner is another process, the controller.
"""

import asyncio
import logging
import time
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError, RayTaskError

from cluster.protocol.view import RankRecord, ReplicaRecord
from workers.errors import EngineError, ReplicaUnavailableError, TramontaneError
from workers.profile.recording import Recording

log = logging.getLogger(__name__)

# How long one call waits on a rank. Short, so that a call that nobody awaits any more does not stay there.
POLL_S = 2.0
CALL_TIMEOUT_S = 60.0


class ReplicaRecorder:
    """`start`, then `recordings`; `end` at any time in between. All methods raise TramontaneError, also when a rank is lost."""

    def __init__(self, replica: ReplicaRecord, num_steps: int) -> None:
        self.replica_id = replica.replica_id
        self.num_ranks = len(replica.ranks)
        self._ranks = replica.ranks
        self._num_steps = num_steps
        self._actors: dict[str, ActorHandle] = {}

    async def start(self) -> None:
        """Its ranks record the next steps with requests. What they recorded for others is forgotten."""
        lead, *_ = self._ranks
        await self._call(lead, "end_profile")
        await asyncio.gather(*(self._call(rank, "prepare_profile") for rank in self._ranks))
        await self._call(lead, "record_steps", self._num_steps)

    async def end(self) -> None:
        """`recordings` returns with what there is."""
        await self._call(self._ranks[0], "end_profile")

    async def recordings(self, max_events: int) -> dict[int, tuple[Recording, int]]:
        """By rank, once all have ended: what it recorded, at most `max_events`, and how far its clock is ahead of this machine's, in
        nanoseconds. Empty if there was no step. Without the ranks that failed after rank 0 had recorded.
        """
        found = {0: await self._recording(self._ranks[0], max_events)}
        if not found[0][0].num_steps:
            return {}
        others = self._ranks[1:]
        outcomes = await asyncio.gather(*(self._recording(r, max_events) for r in others), return_exceptions=True)
        for rank, outcome in zip(others, outcomes, strict=True):
            if isinstance(outcome, TramontaneError):
                log.warning("The profile is without one rank: %s", outcome)
            elif isinstance(outcome, BaseException):
                raise outcome
            else:
                found[rank.rank] = outcome
        return found

    async def _recording(self, rank: RankRecord, max_events: int) -> tuple[Recording, int]:
        while (recording := await self._call(rank, "recording", POLL_S, max_events)) is None:
            pass
        assert isinstance(recording, Recording)
        sent_ns = time.time_ns()
        answer_ns = await self._call(rank, "clock_ns")
        return recording, clock_ahead_ns(sent_ns, answer_ns, time.time_ns())

    async def _call(self, rank: RankRecord, method: str, *arguments: Any) -> Any:
        where = f"Rank {rank.rank} of replica {self.replica_id}"
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                if rank.actor_name not in self._actors:
                    self._actors[rank.actor_name] = await asyncio.to_thread(ray.get_actor, rank.actor_name)
                return await getattr(self._actors[rank.actor_name], method).remote(*arguments)
        except RayTaskError as e:
            if isinstance(e.cause, TramontaneError):
                raise e.cause from None
            raise EngineError(f"{where} failed: {e.cause!r}.") from e
        except (RayError, ValueError) as e:  # the latter where no actor has this name
            raise ReplicaUnavailableError(f"{where} was lost while it was profiled.") from e
        except TimeoutError as e:
            raise ReplicaUnavailableError(f"{where} did not answer in {CALL_TIMEOUT_S:g} s.") from e


def clock_ahead_ns(sent_ns: int, answer_ns: int, received_ns: int) -> int:
    """How far the clock that answered `answer_ns` is ahead of the one that sent the question at `sent_ns` and had the answer at
    `received_ns`; 0 where the clocks may agree.

    Asked at 100 and answered at 140, a clock that says 125 may be right; one that says 520 is 400 ahead, give or take 20.
    """
    return 0 if sent_ns <= answer_ns <= received_ns else answer_ns - (sent_ns + received_ns) // 2
