"""Spreads requests over replicas: admits or refuses, chooses, streams, and accounts for every request it holds.

Knows replicas only through the `Replica` protocol, and token ids only. Does not know HTTP, text or Ray. A replica lost before a
request's first token is replaced by another; one lost later ends the stream with ReplicaUnavailableError, and whoever resumes such
streams does it in `generate`: the deltas yielded so far and `GenerateRequest.output_token_ids` are all it takes.
"""

import contextlib
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from cluster.router.policy import Candidate, choose
from workers.errors import OverloadedError, ReplicaUnavailableError
from workers.protocol import EngineFacts, GenerateRequest, LoadReport, TokenDelta

log = logging.getLogger(__name__)

MAX_INFLIGHT_REQUESTS = 1024
RETRY_AFTER_S = 1


class Replica(Protocol):
    """One model replica, as the router sees it."""

    @property
    def replica_id(self) -> str: ...

    @property
    def facts(self) -> EngineFacts:
        """What start-up learned. Raises ReplicaUnavailableError before the first connection."""

    @property
    def load(self) -> LoadReport:
        """The newest report."""

    def is_ready(self, now: float) -> bool:
        """Whether all ranks took part in a forward pass a moment ago. now: time.monotonic()."""

    def not_ready_reason(self, now: float) -> str | None:
        """One sentence that names the replica, and the stuck rank if there is one; None when ready."""

    def generate(self, request: GenerateRequest) -> AsyncIterator[TokenDelta]:
        """An async generator of deltas up to one with a finish_reason. Closing it aborts the request.

        Raises ReplicaUnavailableError when the replica is lost.
        """


@dataclass(frozen=True, slots=True)
class ReplicaStatus:
    replica_id: str
    ready: bool
    reason: str | None
    load: LoadReport


@dataclass(frozen=True, slots=True)
class Health:
    """`ready`: a request sent now would be taken. `reason` is one sentence when not."""

    ready: bool
    reason: str | None
    replicas: list[ReplicaStatus]


class Router:
    """Use on one event loop. `max_inflight_requests` bounds the sequences held at once, running or queued on a replica."""

    def __init__(
        self,
        replicas: Sequence[Replica],
        *,
        max_inflight_requests: int = MAX_INFLIGHT_REQUESTS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._replicas = tuple(replicas)
        self._max_inflight_requests = max_inflight_requests
        self._clock = clock
        self._num_per_replica = [0] * len(self._replicas)
        self._num_admitted = 0
        self._draining = False

    @property
    def num_inflight_requests(self) -> int:
        """Sequences admitted and not finished."""
        return self._num_admitted

    @property
    def facts(self) -> EngineFacts:
        """The first reachable replica's facts; replicas of one router serve one model. Raises ReplicaUnavailableError."""
        for replica in self._replicas:
            with contextlib.suppress(ReplicaUnavailableError):
                return replica.facts
        raise ReplicaUnavailableError("No replica has been reached yet; try again in a moment.")

    def health(self) -> Health:
        """What is true now; costs no request."""
        now = self._clock()
        statuses = []
        for replica in self._replicas:
            reason = replica.not_ready_reason(now)
            statuses.append(ReplicaStatus(replica.replica_id, reason is None, reason, replica.load))
        if self._draining:
            return Health(False, "The server is shutting down.", statuses)
        if any(s.ready for s in statuses):
            return Health(True, None, statuses)
        reasons = [s.reason for s in statuses if s.reason]
        return Health(False, " ".join(reasons) or "The server has no replica.", statuses)

    def start_draining(self) -> None:
        """From now on nothing new is admitted; what runs goes on."""
        self._draining = True

    @contextlib.contextmanager
    def admit(self, num_requests: int) -> Iterator[None]:
        """Reserves room for this many sequences while the block runs: all of them or none.

        Raises OverloadedError when there is no room, ReplicaUnavailableError when no replica is ready.
        """
        health = self.health()
        if not health.ready:
            raise ReplicaUnavailableError(health.reason or "No replica is ready.")
        if self._num_admitted + num_requests > self._max_inflight_requests:
            raise OverloadedError(
                f"The server holds {self._num_admitted} of at most {self._max_inflight_requests} sequences and has no room "
                f"for {num_requests} more; try again later.",
                retry_after_s=RETRY_AFTER_S,
            )
        self._num_admitted += num_requests
        try:
            yield
        finally:
            self._num_admitted -= num_requests

    async def generate(self, request: GenerateRequest, *, admitted: bool = False) -> AsyncGenerator[TokenDelta, None]:
        """Yields the request's deltas, the last one with a finish_reason. Closing the generator aborts the request.

        admitted: the caller holds an `admit` for it. Raises OverloadedError and ReplicaUnavailableError.
        """
        with contextlib.nullcontext() if admitted else self.admit(1):
            tried: set[int] = set()
            while True:
                index = self._choose(tried)
                started = False
                try:
                    async with contextlib.aclosing(self._stream(index, request)) as deltas:
                        async for delta in deltas:
                            started = True
                            yield delta
                    return
                except ReplicaUnavailableError as e:
                    tried.add(index)
                    if started or not self._ready(tried):
                        raise
                    log.info("Request %s moves to another replica before its first token: %s", request.request_id, e)

    def _ready(self, tried: set[int]) -> list[int]:
        now = self._clock()
        return [i for i, replica in enumerate(self._replicas) if i not in tried and replica.is_ready(now)]

    def _choose(self, tried: set[int]) -> int:
        candidates = []
        for i in self._ready(tried):
            load = self._replicas[i].load
            usage = load.num_used_blocks / load.num_blocks if load.num_blocks else 0.0
            candidates.append(Candidate(i, self._num_per_replica[i], load.num_running + load.num_waiting, usage))
        chosen = choose(candidates)
        if chosen is None:
            raise ReplicaUnavailableError(self.health().reason or "No replica is ready; try again in a moment.")
        return chosen.index

    async def _stream(self, index: int, request: GenerateRequest) -> AsyncGenerator[TokenDelta, None]:
        replica = self._replicas[index]
        self._num_per_replica[index] += 1
        try:
            deltas = replica.generate(request)
            try:
                async for delta in deltas:
                    yield delta
                    if delta.finish_reason is not None:
                        return
            finally:
                await deltas.aclose()  # type: ignore[attr-defined]  # a Replica's generate is an async generator
        finally:
            self._num_per_replica[index] -= 1
        raise ReplicaUnavailableError(
            f"Replica {replica.replica_id} ended the stream of request {request.request_id} early."
        )
