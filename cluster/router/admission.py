"""Who is let in: the bounds on what one gateway holds, whose turn comes when, and how long whoever comes now would wait.

Knows counts, tokens, times and that requests belong to somebody (a tenant, such as an API key). Knows no replica and no line: the router
tells what it sees. Batch lines have bounds of their own: they take nobody's room, and nobody takes theirs.
"""

import math
import random
from collections import Counter, deque
from collections.abc import Callable

from cluster.router.hashing import Hashing
from workers.errors import OverloadedError

MAX_INFLIGHT_REQUESTS = 1024
# Prompt tokens not yet on a replica. A plain number, since there may be no replica to measure it by: some minutes' work for one GPU.
MAX_QUEUED_TOKENS = 2_000_000
# Batch lines, whose runner keeps a window of its own: only against what runs wild.
MAX_INFLIGHT_BATCH_REQUESTS = 16_384
MAX_QUEUED_BATCH_TOKENS = 20_000_000
MAX_TENANT_SHARE = 0.75  # of either bound: whoever floods the server leaves room for others to get in
MAX_RETRY_AFTER_S = 60
MAX_RETURNS_PER_S = 100  # of refused requests, if as many were refused as are held
RECENT_S = 30.0


class Admission:
    """A reservation. `deadline`: on the router's clock; None for none. `num_queued_tokens` are not on a replica yet."""

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
    """Among requests of one priority, tenants take turns, however many requests each has waiting (start-time fair queueing).

    Worked example: A sends four requests, turns 0, 1, 2, 3, then B sends two, turns 0 and 1; they are served as A0 B0 A1 B1 A2 A3. When A2
    is on its replica the time is 2, and C, who comes now, gets turn 2 and not 0: it is owed nothing for the time it was away.
    """

    def __init__(self) -> None:
        self._time = 0.0  # the latest turn that came
        self._next: dict[str | None, float] = {}

    def take(self, tenant: str | None, cost: float) -> float:
        """The turn of a request that comes now; smaller is sooner. One tenant's turns go up, so its requests keep their order."""
        turn = max(self._time, self._next.get(tenant, 0.0))
        if len(self._next) > 1024:
            self._next = {other: after for other, after in self._next.items() if after > self._time}
        self._next[tenant] = turn + cost
        return turn

    def came(self, turn: float) -> None:
        self._time = max(self._time, turn)


class Recent:
    """The last seconds' events, each with a value."""

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


class Bounds:
    """What is held, and what may be. `num_queued_tokens`: of all admissions, not on a replica yet."""

    def __init__(self, *, max_inflight_requests: int, max_queued_tokens: int) -> None:
        self.max_inflight_requests = max_inflight_requests
        self.max_queued_tokens = max_queued_tokens
        self.num_inflight_requests = 0
        self.num_queued_tokens = 0
        self._held: Counter[str] = Counter()  # sequences, by tenant
        self._queued: Counter[str] = Counter()  # tokens

    def check(
        self, num_sequences: int, num_tokens: int, *, wait_s: Callable[[], float | None], tenant: str | None = None
    ) -> None:
        """Raises OverloadedError when it does not fit. A request too large for any queue fits an empty one.

        tenant: may hold MAX_TENANT_SHARE of either bound; None: all of it.
        """
        if tenant is not None:
            self._check_share(tenant, num_sequences, num_tokens, wait_s=wait_s)
        if self.num_inflight_requests + num_sequences > self.max_inflight_requests:
            raise OverloadedError(
                f"The server holds {self.num_inflight_requests} of at most {self.max_inflight_requests} sequences and has no "
                f"room for {num_sequences} more; try again later.",
                retry_after_s=self._retry_after_s(wait_s()),
            )
        if self.num_queued_tokens and self.num_queued_tokens + num_tokens > self.max_queued_tokens:
            raise OverloadedError(
                f"{self.num_queued_tokens} prompt tokens wait for a replica and at most {self.max_queued_tokens} may; there is "
                f"no room for {num_tokens} more. Try again later.",
                retry_after_s=self._retry_after_s(wait_s()),
            )

    def _check_share(
        self, tenant: str, num_sequences: int, num_tokens: int, *, wait_s: Callable[[], float | None]
    ) -> None:
        most, held = math.floor(self.max_inflight_requests * MAX_TENANT_SHARE), self._held[tenant]
        most_tokens, queued = self.max_queued_tokens * MAX_TENANT_SHARE, self._queued[tenant]
        if held and held + num_sequences > most:
            raise OverloadedError(
                f"This API key holds {held} of the at most {most} sequences that one key may; wait for some to end.",
                retry_after_s=self._retry_after_s(wait_s()),
            )
        if queued and queued + num_tokens > most_tokens:
            raise OverloadedError(
                f"{queued} prompt tokens of this API key wait for a replica and at most {most_tokens:.0f} of one key may; there is no "
                f"room for {num_tokens} more. Try again later.",
                retry_after_s=self._retry_after_s(wait_s()),
            )

    def _retry_after_s(self, wait_s: float | None) -> int:
        """Spread over the longer a time the more is held: those refused together would else come back together, and be refused again."""
        spread_s = 2 * self.num_inflight_requests / MAX_RETURNS_PER_S
        return min(MAX_RETRY_AFTER_S, retry_after_s(wait_s) + int(random.uniform(0, spread_s)))

    def _add(self, admission: Admission, num_sequences: int, num_tokens: int) -> None:
        self.num_inflight_requests += num_sequences
        self.num_queued_tokens += num_tokens
        if (tenant := admission.tenant) is not None:
            for counter, change in ((self._held, num_sequences), (self._queued, num_tokens)):
                counter[tenant] += change
                if not counter[tenant]:
                    del counter[tenant]

    def take(self, admission: Admission) -> None:
        self._add(admission, admission.num_sequences, admission.num_queued_tokens)

    def give_back(self, admission: Admission) -> None:
        self._add(admission, -admission.num_sequences, -admission.num_queued_tokens)

    def placed(self, admission: Admission, num_tokens: int) -> None:
        """A sequence went to a replica."""
        num_tokens = min(num_tokens, admission.num_queued_tokens)
        admission.num_queued_tokens -= num_tokens
        self._add(admission, 0, -num_tokens)

    def displaced(self, admission: Admission, num_tokens: int) -> None:
        """A sequence lost its replica and waits again."""
        admission.num_queued_tokens += num_tokens
        self._add(admission, 0, num_tokens)


def check_deadline(deadline_s: float, wait_s: float | None) -> None:
    """Raises OverloadedError for a request whose time would be over before its turn. Both from now on."""
    if wait_s is not None and wait_s > deadline_s:
        raise OverloadedError(
            f"The wait is about {wait_s:.1f} s, longer than the {max(deadline_s, 0.0):.1f} s this request has; try again later.",
            retry_after_s=retry_after_s(wait_s),
        )


def retry_after_s(wait_s: float | None) -> int:
    """Whole seconds from 1 to MAX_RETRY_AFTER_S."""
    return max(1, min(MAX_RETRY_AFTER_S, math.ceil(wait_s or 1.0)))
