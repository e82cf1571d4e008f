"""Spreads requests over replicas: admits or refuses, waits for room, chooses, streams, and resumes elsewhere what a replica drops.

Knows replicas only through the `Replica` protocol, and token ids only. Does not know HTTP, text or Ray. A sequence goes on as long as
there is a replica or hope for one: its deltas are those of one undisturbed run, whatever happens below.
"""

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence

from cluster.protocol.report import BatchDemand, GatewayReport
from cluster.router.admission import (
    MAX_INFLIGHT_BATCH_REQUESTS,
    MAX_INFLIGHT_REQUESTS,
    MAX_QUEUED_BATCH_TOKENS,
    MAX_QUEUED_TOKENS,
    Admission,
    Bounds,
    Recent,
    Turns,
    check_deadline,
)
from cluster.router.dispatcher import Dispatcher
from cluster.router.explanation import Explanation, explain_route
from cluster.router.hashing import Hashing
from cluster.router.health import Health, ReplicaStatus, look
from cluster.router.policy import PolicyName
from cluster.router.replica import Outlook, Replica
from cluster.router.stream import Stream, StreamMovedError, Trace
from cluster.router.table import Place, Seat
from workers.errors import DeadlineExceededError, ReplicaUnavailableError
from workers.protocol import BATCH_PRIORITY, EngineFacts, GenerateRequest, SamplingParams, TokenDelta

__all__ = ["Explanation", "Health", "Outlook", "Replica", "ReplicaStatus", "Router", "Trace"]

log = logging.getLogger(__name__)

QUEUE_TIMEOUT_S = 300.0  # longer than any start-up that is worth waiting for


class Router:
    """Use on one event loop.

    max_inflight_requests: sequences held at once, running or waiting. max_queued_tokens: prompt tokens not yet on a replica. Both without
    batch lines (BATCH_PRIORITY and beyond), for whom there is `batch_room`.
    queue_timeout_s: the longest wait for a replica or for room on one; each resumption waits anew.
    """

    def __init__(
        self,
        replicas: Sequence[Replica] = (),
        *,
        policy: PolicyName = "prefix",
        max_inflight_requests: int = MAX_INFLIGHT_REQUESTS,
        max_queued_tokens: int = MAX_QUEUED_TOKENS,
        queue_timeout_s: float = QUEUE_TIMEOUT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._policy = policy
        self._clock = clock
        self._bounds = Bounds(max_inflight_requests=max_inflight_requests, max_queued_tokens=max_queued_tokens)
        self._batch_bounds = Bounds(
            max_inflight_requests=MAX_INFLIGHT_BATCH_REQUESTS, max_queued_tokens=MAX_QUEUED_BATCH_TOKENS
        )
        self._dispatcher = Dispatcher(
            policy,
            queue_timeout_s=queue_timeout_s,
            clock=clock,
            describe=lambda: self.health().reason or "None is ready.",
        )
        self._table = self._dispatcher.table
        self._arrivals = itertools.count()
        self._turns = Turns()
        self._closing: str | None = None
        self._admits = True
        self._first_tokens = Recent()
        self._stays = Recent()  # on the replica that finished a sequence
        self.num_failovers_total = 0  # a sequence going on elsewhere, because its replica was lost or drained
        self.arrived_tokens_total = 0  # prompt tokens of all that was admitted, without batch lines
        # Told by whoever runs batches here, for the report.
        self.batches: tuple[BatchDemand, ...] = ()
        self.batch_tokens_total = 0
        self.update(replicas, Outlook())

    @property
    def num_inflight_requests(self) -> int:
        """Sequences admitted and not finished."""
        return self._bounds.num_inflight_requests + self._batch_bounds.num_inflight_requests

    @property
    def num_waiting(self) -> int:
        """Sequences waiting at the router for room."""
        return len(self._dispatcher.line)

    @property
    def num_queued_tokens(self) -> int:
        """Prompt tokens of sequences that are not on a replica yet, or not any more."""
        return self._bounds.num_queued_tokens + self._batch_bounds.num_queued_tokens

    @property
    def facts(self) -> EngineFacts:
        """What the replicas' start-up learned, or earlier replicas'. Raises ReplicaUnavailableError when none ever started."""
        facts = self._table.facts or self._dispatcher.outlook.facts
        if facts is None:
            raise ReplicaUnavailableError(
                self._dispatcher.outlook.reason or "No replica has been reached yet; try again in a moment."
            )
        return facts

    def update(self, replicas: Sequence[Replica], outlook: Outlook) -> None:
        """From now on it is these replicas. Streams on others go on until those are closed, and then move."""
        self._dispatcher.update(replicas, outlook)

    def health(self) -> Health:
        """What is true now; costs no request."""
        return look(self._table, self._dispatcher.outlook, closing=self._closing, now=self._clock())

    def batch_room(self) -> int:
        """How many more batch sequences the replicas could take now: what others leave of them, with a few that are next. For a
        runner, who adds it to those it has in flight.
        """
        return max(0, self._table.background_room() - self._dispatcher.line.num_background)

    def report(self, gateway_id: str, url: str) -> GatewayReport:
        """What this router holds now, for whoever scales."""
        now, line = self._clock(), self._dispatcher.line
        per_replica = {seat.replica.replica_id: len(seat.streams) for seat in self._table}
        return GatewayReport(
            gateway_id=gateway_id,
            url=url,
            num_running=sum(per_replica.values()),
            num_queued=len(line) - line.num_background,
            num_queued_tokens=self._bounds.num_queued_tokens,
            oldest_wait_s=line.oldest_wait_s(now),
            arrived_tokens_total=self.arrived_tokens_total,
            ttft_p95_s=self._first_tokens.p95(now),
            streams_per_replica=per_replica,
            batches=self.batches,
            batch_tokens_total=self.batch_tokens_total,
        )

    async def explain(self, prompt_token_ids: list[int], *, policy: PolicyName | None = None) -> Explanation:
        """Where a request with this prompt would go now, and why; nothing is sent."""
        sampling = SamplingParams(max_tokens=1, seed=0)
        request = GenerateRequest(request_id="", prompt_token_ids=prompt_token_ids, sampling=sampling)
        stream = Stream(request, order=(0, 0))
        await self._name_blocks(stream, Hashing())
        return explain_route(self._table, stream, policy or self._policy, num_waiting=self.num_waiting)

    @property
    def closing(self) -> str | None:
        """Why this gateway wants nothing new, in a sentence; None while it does."""
        return self._closing

    def close(self, reason: str, *, admits: bool = False) -> None:
        """From now on `health` says so, and nothing new is admitted unless `admits`; what runs or waits goes on."""
        self._closing, self._admits = reason, admits

    def reopen(self) -> None:
        """Takes `close` back."""
        self._closing, self._admits = None, True

    def end_streams(self, error: Exception) -> int:
        """Every stream ends with the error, where it runs or waits, but lines of batches, whose runner brings them back.

        Returns how many.
        """
        running = [stream for seat in self._table for stream in seat.streams]
        streams = {*running, *(waiter.stream for waiter in self._dispatcher.line)}
        for stream in streams:
            if not stream.is_background:
                stream.interrupt.set(error)
        return sum(not stream.is_background for stream in streams)

    def check_room(self, tenant: str | None) -> None:
        """Raises OverloadedError when `admit` would, for one sequence and whatever prompt. Costs nothing and reserves nothing."""
        self._bounds.check(1, 0, wait_s=lambda: self._estimated_wait_s(0), tenant=tenant)

    @contextlib.contextmanager
    def admit(
        self,
        num_sequences: int,
        num_tokens: int = 0,
        *,
        priority: int = 0,
        deadline: float | None = None,
        tenant: str | None = None,
    ) -> Iterator[Admission]:
        """Reserves room for this many sequences while the block runs: all of them or none. num_tokens: of all their prompts.

        deadline: on the router's clock (time.monotonic()). tenant: whose it is; tenants take turns, and none may hold all the room.
        Raises OverloadedError when there is no room or the wait would outlast the deadline, ReplicaUnavailableError when no replica is
        ready and none is expected.
        """
        now = self._clock()
        if not self._admits or not (self._dispatcher.outlook.expected or self._table.look_for_ready()):
            raise ReplicaUnavailableError(self.health().reason or "No replica is ready; try again in a moment.")
        bounds = self._bounds_for(priority)
        bounds.check(num_sequences, num_tokens, wait_s=lambda: self._estimated_wait_s(priority), tenant=tenant)
        if deadline is not None:
            check_deadline(deadline - now, self._estimated_wait_s(priority, overtakes=True))
        admission = Admission(
            num_sequences,
            num_tokens,
            priority=priority,
            deadline=deadline,
            arrived=now,
            arrival=next(self._arrivals),
            tenant=tenant,
            turn=self._turns.take(tenant, num_sequences),
        )
        if bounds is self._bounds:
            self.arrived_tokens_total += num_tokens
        bounds.take(admission)
        try:
            yield admission
        finally:
            bounds.give_back(admission)

    async def generate(
        self,
        request: GenerateRequest,
        *,
        admission: Admission | None = None,
        trace: Trace | None = None,
        max_crashes: int | None = None,
    ) -> AsyncGenerator[TokenDelta, None]:
        """Yields the request's deltas, the last one with a finish_reason. Closing the generator aborts the request.

        admission: what the caller's `admit` gave; without it the request is admitted here. trace: is kept up to date for the caller.
        max_crashes: replicas that may crash in all while they work on it; at None, only those without a token in between count.
        Raises OverloadedError, ReplicaUnavailableError, DeadlineExceededError, CrashedError for a request that outlived too many
        replicas that crashed, and EngineError for one that outlived too many of all.
        """
        with contextlib.ExitStack() as stack:
            if admission is None:
                num_tokens = len(request.prompt_token_ids)
                admission = stack.enter_context(self.admit(1, num_tokens, priority=request.priority))
            stream = Stream(request, order=admission.order, trace=trace, max_crashes=max_crashes)
            stack.callback(self._watch_deadline(stream, admission))
            while True:
                if self._policy == "prefix":
                    await self._name_blocks(stream, admission.hashing)
                place = await self._dispatcher.place(stream)
                placed = self._clock()
                async with contextlib.aclosing(self._stream(place, stream, admission)) as deltas:
                    async for delta in deltas:
                        yield delta
                        if delta.finish_reason is not None:
                            if not stream.is_background:
                                self._stays.add(self._clock(), self._clock() - placed)
                            return
                if pause_s := stream.pause_s:
                    await stream.interrupt.wait(lambda: asyncio.sleep(pause_s))

    async def _stream(self, place: Place, stream: Stream, admission: Admission) -> AsyncGenerator[TokenDelta, None]:
        """The deltas one replica contributes; ends without a finish_reason when the rest must come from another."""
        seat, num_tokens = place.seat, len(stream.request.prompt_token_ids)
        replica = seat.replica
        trace = stream.trace
        trace.replica_id = replica.replica_id
        if trace.queue_s is None:
            trace.queue_s = self._clock() - admission.arrived
            if self._policy == "prefix":
                trace.num_cached_tokens_predicted = place.decision.num_cached_tokens
        bounds = self._bounds_for(admission.priority)
        bounds.placed(admission, num_tokens)
        self._turns.came(admission.turn)
        deltas = replica.generate(stream.next_attempt())
        is_first = True
        try:
            while True:
                delta = await stream.interrupt.wait(deltas.__anext__)
                if is_first:
                    is_first = False
                    self._table.report_knows(seat, stream)
                    if not stream.output_token_ids and not stream.is_background:
                        self._first_tokens.add(self._clock(), self._clock() - admission.arrived)
                yield stream.take(delta)
        except StopAsyncIteration:
            self._lost(stream, seat, ReplicaUnavailableError(f"Replica {replica.replica_id} ended the stream early."))
        except ReplicaUnavailableError as e:
            self._lost(stream, seat, e)
        except StreamMovedError as e:
            self.num_failovers_total += 1
            stream.move()
            log.info("Request %s moves after %d tokens: %s", stream.request.request_id, len(stream.output_token_ids), e)
        finally:
            try:
                await deltas.aclose()  # type: ignore[attr-defined]  # a Replica's generate is an async generator
            finally:
                self._dispatcher.leave(seat, stream)
        bounds.displaced(admission, num_tokens)

    def _bounds_for(self, priority: int) -> Bounds:
        return self._batch_bounds if priority >= BATCH_PRIORITY else self._bounds

    def _lost(self, stream: Stream, seat: Seat, error: ReplicaUnavailableError) -> None:
        stream.lose(seat.replica, error, alone=self._table.lost(seat))
        self.num_failovers_total += 1
        log.info(
            "Request %s goes on elsewhere after %d tokens: %s",
            stream.request.request_id, len(stream.output_token_ids), error,
        )  # fmt: skip

    async def _name_blocks(self, stream: Stream, hashing: Hashing) -> None:
        facts = self._table.facts
        if facts is not None and facts.enable_prefix_caching:
            await hashing.extend(stream, facts.block_size)

    def _watch_deadline(self, stream: Stream, admission: Admission) -> Callable[[], None]:
        """Interrupts the stream when its time is over; returns what stops watching."""
        if admission.deadline is None:
            return lambda: None
        error = DeadlineExceededError(
            f"The request was not complete after the {admission.deadline - admission.arrived:.2f} s it was given; "
            "give it more time or ask for fewer tokens."
        )
        delay = max(0.0, admission.deadline - self._clock())
        return asyncio.get_running_loop().call_later(delay, stream.interrupt.set, error).cancel

    def _estimated_wait_s(self, priority: int, *, overtakes: bool = False) -> float | None:
        """Of a request that came now: for prompts before it, and for those in line to find room. None when nothing is known.

        overtakes: only those in line that it would not overtake count; else all of its kind, batch lines or others.
        """
        line, bounds = self._dispatcher.line, self._bounds_for(priority)
        background = bounds is self._batch_bounds
        num_of_kind = line.num_background if background else len(line) - line.num_background
        num_tokens, num_before = bounds.num_queued_tokens, num_of_kind
        if overtakes and len(line):
            before = [w.stream.num_tokens for w in line if w.stream.order[0] <= priority]
            num_tokens, num_before = sum(before), len(before)
        by_tokens = self._table.estimated_wait_s(num_tokens, background=background)
        # Not by how many ended lately: on replicas that were idle until now these were few.
        stay_s, num_placed = self._stays.mean(self._clock()), bounds.num_inflight_requests - num_of_kind
        by_places = num_before * stay_s / num_placed if stay_s and num_placed > 0 else None
        return max((w for w in (by_tokens, by_places) if w is not None), default=None)
