"""The current usage of each API key: its token buckets, its running requests, and one object for each request that is charged to it.

Knows limits and arithmetic; knows no secret, no HTTP and no model. Each gateway keeps its own accounts: with `num_gateways` gateways,
each one grants its share of a limit, rounded up.
"""

import contextlib
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from cluster.keys.bucket import Bucket
from cluster.keys.key import ApiKey, Limits
from workers.errors import OverloadedError

MAX_RETRY_AFTER_S = 3600


class _Account:
    """The state of one key under one set of limits."""

    def __init__(self, limits: Limits, num_gateways: int, now: float) -> None:
        def share(limit: int | None) -> int | None:
            return None if limit is None else math.ceil(limit / num_gateways)

        rpm, tpm = share(limits.requests_per_minute), share(limits.tokens_per_minute)
        self.limits = limits
        self.requests = None if rpm is None else Bucket(rpm, now)
        self.tokens = None if tpm is None else Bucket(tpm, now)
        self.max_concurrency = share(limits.max_concurrency)


@dataclass
class RequestUsage:
    """What one request uses of its key. The counts go to the ledger at the end; `model` is set once it is known to be served."""

    key: ApiKey
    endpoint: str
    model: str = ""
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    failed: bool = False
    _account: _Account = field(repr=False, kw_only=True)
    _clock: Callable[[], float] = field(repr=False, kw_only=True)

    @contextlib.contextmanager
    def reserve(self, num_prompt_tokens: int) -> Iterator[None]:
        """Around a generation. Raises OverloadedError if the key has too few tokens left this minute.

        If the body raises OverloadedError, nothing was computed yet and the tokens are given back.
        """
        bucket = self._account.tokens
        if bucket is not None:
            now = self._clock()
            if wait_s := bucket.wait_s(max(num_prompt_tokens, 1), now):
                raise OverloadedError(
                    f"This API key is limited to {bucket.limit:g} tokens per minute here: {bucket.level(now):.0f} are left and the "
                    f"request needs {num_prompt_tokens} to start.",
                    remedy="Try again later.",
                    retry_after_s=_retry_after_s(wait_s),
                )
            bucket.take(num_prompt_tokens, now)
        self.num_prompt_tokens += num_prompt_tokens
        try:
            yield
        except OverloadedError:
            if bucket is not None:
                bucket.take(-num_prompt_tokens, self._clock())
            self.num_prompt_tokens -= num_prompt_tokens
            raise

    def add_output_tokens(self, num_tokens: int) -> None:
        """Charges generated tokens as they arrive. They may put the key in debt, which then delays its next request."""
        self.num_output_tokens += num_tokens
        if self._account.tokens is not None:
            self._account.tokens.take(num_tokens, self._clock())

    def rate_limit_headers(self) -> dict[str, str]:
        """OpenAI's x-ratelimit-* headers, for the limits that the key has."""
        headers, now = {}, self._clock()
        for what, bucket in (("requests", self._account.requests), ("tokens", self._account.tokens)):
            if bucket is not None:
                headers[f"x-ratelimit-limit-{what}"] = f"{bucket.limit:.0f}"
                headers[f"x-ratelimit-remaining-{what}"] = f"{max(math.floor(bucket.level(now)), 0)}"
                headers[f"x-ratelimit-reset-{what}"] = format_duration(bucket.full_in_s(now))
        return headers


class Accounts:
    """The accounts of all keys at one gateway."""

    def __init__(self, *, num_gateways: int = 1, clock: Callable[[], float] = time.monotonic) -> None:
        self._num_gateways = num_gateways
        self._clock = clock
        self._accounts: dict[str, _Account] = {}
        self._num_running: Counter[str] = Counter()

    def usage(self, key: ApiKey, endpoint: str) -> RequestUsage:
        """A new request's usage, to pass to `running`. Charges nothing yet."""
        account = self._accounts.get(key.id)
        if account is None or account.limits != key.limits:
            account = self._accounts[key.id] = _Account(key.limits, self._num_gateways, self._clock())
        return RequestUsage(key, endpoint, _account=account, _clock=self._clock)

    def unlimited_usage(self, key: ApiKey, endpoint: str) -> RequestUsage:
        """Usage that is counted but not limited."""
        return RequestUsage(key, endpoint, _account=_Account(Limits(), 1, self._clock()), _clock=self._clock)

    @contextlib.contextmanager
    def running(self, usage: RequestUsage) -> Iterator[None]:
        """Around the whole request. Raises OverloadedError if the key has too many requests running, or had too many this minute."""
        account = usage._account
        if account.max_concurrency is not None and self._num_running[usage.key.id] >= account.max_concurrency:
            raise OverloadedError(
                f"This API key is limited to {account.max_concurrency} concurrent requests here, and all of them are running.",
                remedy="Wait for one to finish.",
                retry_after_s=1,
            )
        if account.requests is not None:
            now = self._clock()
            if wait_s := account.requests.wait_s(1, now):
                raise OverloadedError(
                    f"This API key is limited to {account.requests.limit:g} requests per minute here, and has used them up.",
                    remedy="Try again later.",
                    retry_after_s=_retry_after_s(wait_s),
                )
            account.requests.take(1, now)
        self._num_running[usage.key.id] += 1
        try:
            yield
        finally:
            self._num_running[usage.key.id] -= 1


def format_duration(seconds: float) -> str:
    """In OpenAI's format: 250ms, 6.5s, 1m30s."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    if seconds < 60:
        return f"{seconds:.3g}s"
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes}m{rest}s"


def _retry_after_s(wait_s: float) -> int:
    return max(1, min(MAX_RETRY_AFTER_S, math.ceil(wait_s)))
