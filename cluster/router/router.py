"""Spreads requests over replicas: admits, queues, chooses a replica, streams tokens, and resumes on another replica after a loss.

Knows replicas only through the `Replica` protocol, and token ids only. Does not know HTTP, text or Ray. A sequence continues as long as
there is a replica or one is expected: its deltas are those of one undisturbed run, whatever happens below.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence

from cluster.protocol.report import BatchDemand, GatewayReport
from cluster.protocol.routing import RoutingPolicy
from cluster.router.admission.admission import Admission, AdmissionControl, Recent
from cluster.router.admission.bounds import MAX_INFLIGHT_REQUESTS, MAX_QUEUED_TOKENS, QUEUE_TIMEOUT_S
from cluster.router.admission.hashing import Hashing
from cluster.router.dispatcher import Dispatcher
from cluster.router.health import Health, ReplicaStatus, check_health
from cluster.router.load_balancing.explanation import Explanation, explain_route
from cluster.router.load_balancing.table import Assignment, ReplicaEntry
from cluster.router.numerics import MAX_WAIT_S
from cluster.router.replica import Availability, Replica
from cluster.router.stream import Stream, StreamMovedError, Trace
from workers.errors import ReplicaUnavailableError
from workers.protocol import EngineFacts, GenerateRequest, SamplingParams, TokenDelta

__all__ = ["Availability", "Explanation", "Health", "Replica", "ReplicaStatus", "Router", "Trace"]

log = logging.getLogger(__name__)


class Router:
    """Use on one event loop.

    max_inflight_requests: sequences held at once, running or waiting. max_queued_tokens: prompt tokens not yet on a replica. Both without
    batch lines (BATCH_PRIORITY and above), for which there is `batch_room`. queue_timeout_s: the longest wait for a replica or for room on
    one; it starts over with each resumption. numerics_wait_s: of it, the longest wait for a replica that computes the same bits.
    """

    def __init__(
        self,
        replicas: Sequence[Replica] = (),
        *,
        policy: RoutingPolicy = "prefix",
        max_inflight_requests: int = MAX_INFLIGHT_REQUESTS,
        max_queued_tokens: int = MAX_QUEUED_TOKENS,
        queue_timeout_s: float = QUEUE_TIMEOUT_S,
        numerics_wait_s: float = MAX_WAIT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._policy = policy
        self._clock = clock
        self._dispatcher = Dispatcher(
            policy,
            queue_timeout_s=queue_timeout_s,
            numerics_wait_s=numerics_wait_s,
            clock=clock,
            describe=lambda: self.health().reason or "No replica is ready.",
        )
        self._table, self._queue = self._dispatcher.table, self._dispatcher.queue
        self._admission = AdmissionControl(
            self._table,
            self._queue,
            max_inflight_requests=max_inflight_requests,
            max_queued_tokens=max_queued_tokens,
            clock=clock,
        )
        self._closing: str | None = None
        self._admits = True
        self._first_tokens = Recent()
        self.num_failovers_total = 0  # sequences that continued elsewhere because their replica was lost or drained
        self.num_numerics_changes_total = 0  # of them, those that continued with other numerics in their middle
        # Set by the runner of batches, for the report.
        self.batches: tuple[BatchDemand, ...] = ()
        self.batch_tokens_total = 0
        self.update(replicas, Availability())

    @property
    def num_inflight_requests(self) -> int:
        """Sequences admitted and not finished."""
        return self._admission.num_inflight_requests

    @property
    def num_waiting(self) -> int:
        """Sequences waiting at the router for room."""
        return len(self._queue)

    def adapters(self) -> tuple[set[str], set[str]]:
        """The revisions of the sequences that are on replicas, and of those that wait here."""
        running = {s.request.adapter for entry in self._table for s in entry.streams}
        waiting = {waiter.stream.request.adapter for waiter in self._queue}
        return {a for a in running if a is not None}, {a for a in waiting if a is not None}

    @property
    def num_batch_sequences(self) -> int:
        """Those of batches, admitted and not finished."""
        return self._admission.batch.num_inflight_requests

    @property
    def is_scaled_to_zero(self) -> bool:
        """Whether no replica runs, and the next request starts one."""
        availability = self._dispatcher.availability
        return availability.expected and availability.scaled_to_zero

    @property
    def num_stale(self) -> int:
        """Sequences that have left the queue and are still held in memory; bounded."""
        return self._queue.num_stale

    @property
    def num_queued_tokens(self) -> int:
        """Prompt tokens of sequences that are not on a replica."""
        return self._admission.num_queued_tokens

    @property
    def tenants(self) -> frozenset[str]:
        """The tenants whose requests count against the limits now."""
        return self._admission.online.tenants | self._admission.batch.tenants

    @property
    def facts(self) -> EngineFacts:
        """What the start-up of the replicas, or of earlier ones, determined. Raises ReplicaUnavailableError if none ever started."""
        availability = self._dispatcher.availability
        facts = self._table.facts or availability.facts
        if facts is None:
            remedy = None if availability.reason else "Try again in a moment."
            raise ReplicaUnavailableError(availability.reason or "No replica has been reached yet.", remedy=remedy)
        return facts

    def update(self, replicas: Sequence[Replica], availability: Availability) -> None:
        """Replaces the set of replicas. Streams on removed ones continue until those are closed, and then move."""
        self._dispatcher.update(replicas, availability)

    def health(self) -> Health:
        """The current health; costs no request."""
        return check_health(self._table, self._dispatcher.availability, closing=self._closing, now=self._clock())

    def batch_room(self) -> int:
        """How many more batch sequences the replicas could take now: what online requests leave, plus a few to come next.

        A runner adds this to the number it has in flight.
        """
        return max(0, self.batch_balance())

    def batch_balance(self) -> int:
        """The same, below 0 while more of them wait than there is room for."""
        return self._table.background_room() - self._queue.num_background

    def report(self, gateway_id: str, url: str) -> GatewayReport:
        """The load of this router, for the autoscaler."""
        now, queue = self._clock(), self._queue
        per_replica = {entry.replica.replica_id: len(entry.streams) for entry in self._table}
        return GatewayReport(
            gateway_id=gateway_id,
            url=url,
            num_running=sum(per_replica.values()),
            num_queued=queue.num_online,
            num_queued_tokens=self._admission.online.num_queued_tokens,
            oldest_wait_s=queue.oldest_wait_s(now),
            arrived_tokens_total=self._admission.arrived_tokens_total,
            ttft_p95_s=self._first_tokens.p95(now),
            streams_per_replica=per_replica,
            batches=self.batches,
            batch_tokens_total=self.batch_tokens_total,
        )

    async def explain(
        self, prompt_token_ids: list[int], *, policy: RoutingPolicy | None = None, adapter: str | None = None
    ) -> Explanation:
        """Where a request with this prompt, and this revision of an adapter, would go now, and why. Sends nothing."""
        sampling = SamplingParams(max_tokens=1, seed=0)
        request = GenerateRequest(request_id="", prompt_token_ids=prompt_token_ids, sampling=sampling, adapter=adapter)
        stream = Stream(request, order=(0, 0))
        await self._hash_blocks(stream, Hashing())
        return explain_route(self._table, stream, policy or self._policy, num_waiting=self.num_waiting)

    @property
    def closing(self) -> str | None:
        """Why this gateway accepts no new requests, one sentence; None while it does."""
        return self._closing

    def close(self, reason: str, *, admits: bool = False) -> None:
        """`health` is not ready from now on, and nothing new is admitted unless `admits`. Admitted requests continue."""
        self._closing, self._admits = reason, admits

    def reopen(self) -> None:
        """Undoes `close`."""
        self._closing, self._admits = None, True

    def end_streams(self, error: Exception) -> int:
        """Ends every running or waiting stream with the error, except batch lines, which their runner tries again.

        Returns how many.
        """
        running = [stream for entry in self._table for stream in entry.streams]
        queued = [waiter.stream for waiter in self._queue]
        online = {stream for stream in (*running, *queued) if not stream.is_background}
        for stream in online:
            stream.interrupt.set(error)
        return len(online)

    def check_room(self, tenant: str | None) -> None:
        """Raises OverloadedError if `admit` would refuse a single sequence, whatever its prompt. Reserves nothing."""
        self._admission.check_room(tenant)

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

        deadline: on the router's clock (time.monotonic()). tenant: the owner; tenants take turns, and none may hold all the room.
        Raises OverloadedError if there is no room or the wait would exceed the deadline, ReplicaUnavailableError if no replica is ready
        and none is expected.
        """
        if not self._admits or not (self._dispatcher.availability.expected or self._table.accepts_requests()):
            reason = self.health().reason
            remedy = None if reason else "Try again in a moment."
            raise ReplicaUnavailableError(reason or "No replica is ready.", remedy=remedy)
        admitting = self._admission.admit(
            num_sequences, num_tokens, priority=priority, deadline=deadline, tenant=tenant
        )
        with admitting as admission:
            yield admission

    async def generate(
        self,
        request: GenerateRequest,
        *,
        admission: Admission | None = None,
        trace: Trace | None = None,
        max_crashes: int | None = None,
        numerics: str | None = None,
        take: Callable[[TokenDelta], bool] | None = None,
    ) -> AsyncGenerator[TokenDelta, None]:
        """Yields the request's deltas, the last one with a finish_reason. Closing the generator aborts the request.

        admission: from the caller's `admit`; without it the request is admitted here. trace: kept up to date for the caller.
        max_crashes: how many replicas may crash in all while they work on it; None: only crashes without a token in between count.
        numerics: of the replica that generated the request's `output_token_ids`.
        take: see Replica.generate; never asked about the first delta of a replica and the last one of the request. The ids of requests in
        these deltas are those of attempts.
        Raises OverloadedError, ReplicaUnavailableError, DeadlineExceededError, CrashedError if too many replicas crashed on the request,
        and EngineError if too many were lost.
        """
        with contextlib.ExitStack() as stack:
            if admission is None:
                num_tokens = len(request.prompt_token_ids)
                admission = stack.enter_context(self.admit(1, num_tokens, priority=request.priority))
            stream = Stream(request, order=admission.order, trace=trace, max_crashes=max_crashes)
            stream.numerics = numerics
            if (deadline := admission.deadline) is not None:
                stack.callback(stream.end_after(deadline - self._clock(), given_s=deadline - admission.arrived))
            while True:
                if stream.trace.spans is not None:
                    stream.trace.spans.begin_route()
                if self._policy == "prefix":
                    await self._hash_blocks(stream, admission.hashing)
                assignment = await self._dispatcher.assign(stream)
                assigned_at = self._clock()
                async with contextlib.aclosing(self._stream(assignment, stream, admission, take)) as deltas:
                    async for delta in deltas:
                        yield delta
                        if delta.finish_reason is not None:
                            if not stream.is_background:
                                self._admission.finished(self._clock() - assigned_at)
                            return
                if pause_s := stream.pause_s:
                    await stream.interrupt.wait(lambda: asyncio.sleep(pause_s))

    async def _stream(
        self,
        assignment: Assignment,
        stream: Stream,
        admission: Admission,
        take: Callable[[TokenDelta], bool] | None,
    ) -> AsyncGenerator[TokenDelta, None]:
        """The deltas of one replica; ends without a finish_reason if another replica must continue."""
        entry, num_tokens = assignment.entry, len(stream.request.prompt_token_ids)
        replica = entry.replica
        numerics, trace = replica.facts.numerics, stream.trace
        trace.replica_id = replica.replica_id
        if trace.queue_s is None:
            trace.queue_s = self._clock() - admission.arrived
            if self._policy == "prefix":
                trace.num_cached_tokens_predicted = assignment.decision.num_cached_tokens
        self._admission.dispatched(admission, num_tokens)
        request, spans, num_before = stream.next_attempt(), trace.spans, len(stream.output_token_ids)
        if spans is not None:
            num_cached = assignment.decision.num_cached_tokens
            request = spans.begin_attempt(request, replica.replica_id, num_cached_tokens=num_cached)
        is_first = True

        def take_here(delta: TokenDelta) -> bool:
            # What happens once, and what ends something, is for the loop below.
            if is_first or delta.finish_reason is not None or stream.numerics != numerics:
                return False
            assert take is not None
            if not take(delta):
                return False
            stream.record(delta)
            return True

        deltas = replica.generate(request, take=None if take is None else take_here)
        try:
            while True:
                delta = await stream.interrupt.wait(deltas.__anext__)
                if delta.elsewhere:
                    raise ReplicaUnavailableError(f"Replica {replica.replica_id}: {delta.error}")
                if is_first:
                    is_first = False
                    if spans is not None:
                        spans.first_token()
                    self._table.report_includes(entry, stream)
                    if not stream.output_token_ids and not stream.is_background:
                        self._first_tokens.add(self._clock(), self._clock() - admission.arrived)
                if stream.numerics != numerics and (delta.token_ids or delta.prompt_logprobs):
                    self.num_numerics_changes_total += stream.change_numerics(numerics, replica.replica_id)
                    trace.numerics = numerics
                yield stream.record(delta)
        except StopAsyncIteration:
            self._lost(stream, entry, ReplicaUnavailableError(f"Replica {replica.replica_id} ended the stream early."))
        except ReplicaUnavailableError as e:
            self._lost(stream, entry, e)
        except StreamMovedError as e:
            self.num_failovers_total += 1
            stream.move()
            if spans is not None:
                spans.moved(num_tokens=len(stream.output_token_ids))
            log.info("Request %s moves after %d tokens: %s", stream.request.request_id, len(stream.output_token_ids), e)
        finally:
            try:
                await deltas.aclose()  # type: ignore[attr-defined]  # a Replica's generate is an async generator
            finally:
                self._dispatcher.leave(entry, stream)
                if spans is not None:
                    spans.end_attempt(num_tokens=len(stream.output_token_ids) - num_before)
        self._admission.requeued(admission, num_tokens)

    def _lost(self, stream: Stream, entry: ReplicaEntry, error: ReplicaUnavailableError) -> None:
        if stream.trace.spans is not None:
            stream.trace.spans.lost(error, num_tokens=len(stream.output_token_ids))
        stream.lose(entry.replica, error, alone=self._table.was_alone(entry))
        self.num_failovers_total += 1
        log.info(
            "Request %s continues on another replica after %d tokens: %s",
            stream.request.request_id, len(stream.output_token_ids), error,
        )  # fmt: skip

    async def _hash_blocks(self, stream: Stream, hashing: Hashing) -> None:
        facts = self._table.facts
        if facts is not None and facts.enable_prefix_caching:
            await hashing.extend(stream, facts.block_size)
