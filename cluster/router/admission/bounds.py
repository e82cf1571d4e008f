"""How much one gateway admits: limits on sequences and queued prompt tokens, for all clients and for each tenant.

Knows counts and tokens, and when to tell a refused client to retry. Knows no replica, no queue and no order. The constants are the only
place where these defaults are written; options take them from here.
"""

import math
import random
from collections import Counter
from collections.abc import Callable

from workers.errors import OverloadedError

MAX_INFLIGHT_REQUESTS = 1024
# Prompt tokens not yet on a replica. A plain number, since there may be no replica to measure it by: some minutes' work for one GPU.
MAX_QUEUED_TOKENS = 2_000_000
# The runner of batches keeps a window of its own; these limits only stop a runaway.
MAX_INFLIGHT_BATCH_REQUESTS = 16_384
MAX_QUEUED_BATCH_TOKENS = 20_000_000
QUEUE_TIMEOUT_S = 300.0  # longer than any start-up worth waiting for
MAX_TENANT_SHARE = 0.75  # of either limit, so that one tenant's flood leaves room for others
MAX_RETRY_AFTER_S = 60
MAX_RETRIES_PER_S = 100  # of refused requests, if as many are refused as are held


class Bounds:
    """The limits and what counts against them. `num_queued_tokens`: prompt tokens of all admissions that are not on a replica yet."""

    def __init__(self, *, max_inflight_requests: int, max_queued_tokens: int) -> None:
        self.max_inflight_requests = max_inflight_requests
        self.max_queued_tokens = max_queued_tokens
        self.num_inflight_requests = 0
        self.num_queued_tokens = 0
        self._inflight: Counter[str] = Counter()  # sequences by tenant
        self._queued: Counter[str] = Counter()  # tokens by tenant

    @property
    def tenants(self) -> frozenset[str]:
        """The tenants that hold a sequence or a queued token."""
        return frozenset(self._inflight) | frozenset(self._queued)

    def check(
        self, num_sequences: int, num_tokens: int, *, wait_s: Callable[[], float | None], tenant: str | None = None
    ) -> None:
        """Raises OverloadedError if the request does not fit. A request larger than the whole queue fits an empty one.

        tenant: may hold MAX_TENANT_SHARE of either limit; None: all of it. wait_s: estimates the wait; called on refusal only.
        """
        if tenant is not None:
            self._check_share(tenant, num_sequences, num_tokens, wait_s=wait_s)
        if self.num_inflight_requests + num_sequences > self.max_inflight_requests:
            raise self._refusal(
                f"The server holds {self.num_inflight_requests} of at most {self.max_inflight_requests} sequences and has no "
                f"room for {num_sequences} more.",
                wait_s(),
            )
        if self.num_queued_tokens and self.num_queued_tokens + num_tokens > self.max_queued_tokens:
            raise self._refusal(
                f"{self.num_queued_tokens} of at most {self.max_queued_tokens} prompt tokens wait for a replica, and there is no "
                f"room for {num_tokens} more.",
                wait_s(),
            )

    def _check_share(
        self, tenant: str, num_sequences: int, num_tokens: int, *, wait_s: Callable[[], float | None]
    ) -> None:
        most, held = math.floor(self.max_inflight_requests * MAX_TENANT_SHARE), self._inflight[tenant]
        most_tokens, queued = self.max_queued_tokens * MAX_TENANT_SHARE, self._queued[tenant]
        if held and held + num_sequences > most:
            raise self._refusal(
                f"This API key holds {held} of the at most {most} sequences that one key may hold.",
                wait_s(),
                remedy="Wait until some of its requests have finished.",
            )
        if queued and queued + num_tokens > most_tokens:
            raise self._refusal(
                f"{queued} prompt tokens of this API key wait for a replica. One key may have at most {most_tokens:.0f} waiting, "
                f"and there is no room for {num_tokens} more.",
                wait_s(),
            )

    def _refusal(self, message: str, wait_s: float | None, *, remedy: str = "Try again later.") -> OverloadedError:
        """The more requests are held, the wider the retries are spread: clients refused together would otherwise all return together."""
        spread_s = 2 * self.num_inflight_requests / MAX_RETRIES_PER_S
        after_s = min(MAX_RETRY_AFTER_S, retry_after_s(wait_s) + int(random.uniform(0, spread_s)))
        return OverloadedError(message, remedy=remedy, retry_after_s=after_s)

    def add(self, tenant: str | None, num_sequences: int, num_tokens: int) -> None:
        """Counts sequences and queued tokens against the limits; negative numbers release them."""
        self.num_inflight_requests += num_sequences
        self.num_queued_tokens += num_tokens
        if tenant is not None:
            for counter, change in ((self._inflight, num_sequences), (self._queued, num_tokens)):
                counter[tenant] += change
                if not counter[tenant]:
                    del counter[tenant]


def check_deadline(deadline_s: float, wait_s: float | None) -> None:
    """Raises OverloadedError if a request would miss its deadline while it waits. Both arguments are seconds from now."""
    if wait_s is not None and wait_s > deadline_s:
        raise OverloadedError(
            f"The wait is about {wait_s:.1f} s, longer than the {max(deadline_s, 0.0):.1f} s this request has.",
            remedy="Try again later, or give the request more time.",
            retry_after_s=retry_after_s(wait_s),
        )


def retry_after_s(wait_s: float | None) -> int:
    """Whole seconds from 1 to MAX_RETRY_AFTER_S."""
    return max(1, min(MAX_RETRY_AFTER_S, math.ceil(wait_s or 1.0)))
