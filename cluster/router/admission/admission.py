"""Admits or refuses requests, gives each its turn, and estimates how long a new request would wait.

Knows the limits (bounds.py), the queue and the table, and that requests belong to tenants, such as API keys. Batch lines have limits of
their own: they take no room from online requests, and online requests take none from them.
"""

import contextlib
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator

from cluster.router.admission.bounds import (
    MAX_INFLIGHT_BATCH_REQUESTS,
    MAX_QUEUED_BATCH_TOKENS,
    Bounds,
    check_deadline,
)
from cluster.router.admission.hashing import Hashing
from cluster.router.admission.request_queue import RequestQueue
from cluster.router.load_balancing.table import Assignment, ReplicaTable
from workers.protocol import BATCH_PRIORITY

MAX_TENANTS = 1024  # remembered by Turns before it forgets those that have no advance
RECENT_S = 30.0


class Admission:
    """A reservation. `deadline`: on the router's clock, or None. `num_queued_tokens`: prompt tokens that are not on a replica yet."""

    def __init__(
        self,
        num_sequences: int,
        num_tokens: int,
        *,
        priority: int,
        deadline: float | None,
        arrived: float,
        arrival: int,
        tenant: str | None = None,
        turn: float = 0.0,
    ) -> None:
        self.num_sequences = num_sequences
        self.num_queued_tokens = num_tokens
        self.priority = priority
        self.deadline = deadline
        self.arrived = arrived
        self.tenant = tenant
        self.turn = turn
        self.order = (priority, turn, arrival)
        self.hashing = Hashing()


class Turns:
    """Start-time fair queueing: requests of one priority alternate between tenants, however many each tenant has queued.

    Worked example: A sends four requests, turns 0, 1, 2, 3, then B sends two, turns 0 and 1; they are served as A0 B0 A1 B1 A2 A3. When A2
    is dispatched the virtual time is 2. C, who arrives then, gets turn 2 and not 0: it has no claim to the time before it arrived.
    """

    def __init__(self) -> None:
        self._time = 0.0  # the latest turn dispatched
        self._next: dict[str | None, float] = {}

    @property
    def num_tenants(self) -> int:
        """The tenants remembered, about MAX_TENANTS at most."""
        return len(self._next)

    def next_turn(self, tenant: str | None, cost: float) -> float:
        """The turn of a request that arrives now; smaller is sooner. A tenant's turns only grow, so its requests keep their order."""
        turn = max(self._time, self._next.get(tenant, 0.0))
        if len(self._next) > MAX_TENANTS:
            self._next = {other: after for other, after in self._next.items() if after > self._time}
        self._next[tenant] = turn + cost
        return turn

    def advance(self, turn: float) -> None:
        """A request with this turn was dispatched."""
        self._time = max(self._time, turn)


class Recent:
    """The values of the last RECENT_S seconds."""

    def __init__(self, max_events: int = 4096) -> None:
        self._max_events = max_events
        self._events: deque[tuple[float, float]] = deque()
        self._total = 0.0

    def add(self, now: float, value: float) -> None:
        self._events.append((now, value))
        self._total += value
        if len(self._events) > self._max_events:
            self._total -= self._events.popleft()[1]

    def values(self, now: float) -> list[float]:
        self._forget(now)
        return [value for _, value in self._events]

    def mean(self, now: float) -> float | None:
        self._forget(now)
        return max(self._total, 0.0) / len(self._events) if self._events else None

    def p95(self, now: float) -> float | None:
        values = sorted(self.values(now))
        return values[math.ceil(0.95 * len(values)) - 1] if values else None

    def _forget(self, now: float) -> None:
        while self._events and now - self._events[0][0] > RECENT_S:
            self._total -= self._events.popleft()[1]


class AdmissionControl:
    """`admit` reserves room. `dispatched`, `requeued` and `finished` report the progress of an admitted sequence."""

    def __init__(
        self,
        table: ReplicaTable,
        queue: RequestQueue[Assignment],
        *,
        max_inflight_requests: int,
        max_queued_tokens: int,
        clock: Callable[[], float],
    ) -> None:
        self.arrived_tokens_total = 0  # prompt tokens of all admitted requests, without batch lines
        self.online = Bounds(max_inflight_requests=max_inflight_requests, max_queued_tokens=max_queued_tokens)
        self.batch = Bounds(
            max_inflight_requests=MAX_INFLIGHT_BATCH_REQUESTS, max_queued_tokens=MAX_QUEUED_BATCH_TOKENS
        )
        self._table = table
        self._queue = queue
        self._clock = clock
        self._arrivals = itertools.count()
        self._turns = Turns()
        self._stays = Recent()  # seconds on the replica that finished a sequence

    @property
    def num_inflight_requests(self) -> int:
        """Sequences admitted and not finished."""
        return self.online.num_inflight_requests + self.batch.num_inflight_requests

    @property
    def num_queued_tokens(self) -> int:
        """Prompt tokens of sequences that are not on a replica."""
        return self.online.num_queued_tokens + self.batch.num_queued_tokens

    def check_room(self, tenant: str | None) -> None:
        """Raises OverloadedError if `admit` would refuse a single sequence, whatever its prompt. Reserves nothing."""
        self.online.check(1, 0, wait_s=lambda: self._estimated_wait_s(0), tenant=tenant)

    @contextlib.contextmanager
    def admit(
        self, num_sequences: int, num_tokens: int, *, priority: int, deadline: float | None, tenant: str | None
    ) -> Iterator[Admission]:
        """Reserves room while the block runs. Raises OverloadedError; see Router.admit."""
        now = self._clock()
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
            turn=self._turns.next_turn(tenant, num_sequences),
        )
        if bounds is self.online:
            self.arrived_tokens_total += num_tokens
        bounds.add(tenant, num_sequences, num_tokens)
        try:
            yield admission
        finally:
            bounds.add(tenant, -num_sequences, -admission.num_queued_tokens)

    def dispatched(self, admission: Admission, num_tokens: int) -> None:
        """A sequence was sent to a replica."""
        num_tokens = min(num_tokens, admission.num_queued_tokens)
        admission.num_queued_tokens -= num_tokens
        self._bounds_for(admission.priority).add(admission.tenant, 0, -num_tokens)
        self._turns.advance(admission.turn)

    def requeued(self, admission: Admission, num_tokens: int) -> None:
        """A sequence lost its replica and waits again."""
        admission.num_queued_tokens += num_tokens
        self._bounds_for(admission.priority).add(admission.tenant, 0, num_tokens)

    def finished(self, seconds: float) -> None:
        """An online sequence finished after this long on its last replica."""
        self._stays.add(self._clock(), seconds)

    def _bounds_for(self, priority: int) -> Bounds:
        return self.batch if priority >= BATCH_PRIORITY else self.online

    def _estimated_wait_s(self, priority: int, *, overtakes: bool = False) -> float | None:
        """The wait of a request that arrives now: for prompts before it, and for queued sequences to find room. None if unknown.

        overtakes: count only the queued requests it would not overtake; otherwise all of its kind, batch lines or online requests.
        """
        queue, bounds = self._queue, self._bounds_for(priority)
        background = bounds is self.batch
        num_of_kind = queue.num_background if background else queue.num_online
        num_tokens, num_before = bounds.num_queued_tokens, num_of_kind
        if overtakes and len(queue):
            before = [w.stream.num_tokens for w in queue if w.stream.order[0] <= priority]
            num_tokens, num_before = sum(before), len(before)
        by_tokens = self._table.estimated_wait_s(num_tokens, background=background)
        # Not by how many finished lately: on replicas that were idle until now these were few.
        stay_s, num_running = self._stays.mean(self._clock()), bounds.num_inflight_requests - num_of_kind
        by_room = num_before * stay_s / num_running if stay_s and num_running > 0 else None
        return max((w for w in (by_tokens, by_room) if w is not None), default=None)
