"""What one request brings along besides its body: its API key's usage and limits, and how a batch line differs from an HTTP request.

Made once for each request, by a middleware (server/limits.py) or by the executor of batch lines (line_executor.py), and passed on as an
argument. Knows priorities, seeds and accounting; knows no endpoint and no HTTP.
"""

import contextlib
from dataclasses import dataclass, field

from aiohttp import web

from cluster.api.generation import sampling
from cluster.keys.accounts import RequestUsage
from cluster.keys.key import OWN_ID
from cluster.tracing.request import RequestTrace
from workers.protocol import BATCH_PRIORITY

# A header line of 8 KB is the limit of many proxies.
MAX_IGNORED_CHARS = 2048


@dataclass(frozen=True, kw_only=True)
class RequestContext:
    """`usage`: what the request has used of its API key; None if no key is charged.

    `seed`: for a body without one; None: a random one. `is_batch_line`: a line of a batch, which runs after all other requests.
    `max_crashes`: give the request up after it was running on this many crashed replicas; None: the router's default.
    `ignored`: the paths of the body's fields that had no effect; the response's header names them. `adapters`: the revision that the
    request uses, if any. `at_end`: closed when the request has ended. `trace`: its spans; None where nothing is traced.
    """

    usage: RequestUsage | None = None
    seed: int | None = None
    is_batch_line: bool = False
    max_crashes: int | None = None
    ignored: list[str] = field(default_factory=list)
    adapters: list[str] = field(default_factory=list)
    at_end: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    trace: RequestTrace | None = None

    @property
    def traceparent(self) -> str | None:
        """The request's span, for work that goes on after it."""
        return None if self.trace is None else self.trace.traceparent

    @property
    def tenant(self) -> str | None:
        """The API key's id, for the router's fair queueing. None without a key, and for the server's own key, which has no limits."""
        return None if self.usage is None or self.usage.key.id == OWN_ID else self.usage.key.id

    def seed_of(self, requested: int | None) -> int:
        """The requested seed, or this context's."""
        if requested is not None:
            return requested
        return sampling.random_seed() if self.seed is None else self.seed

    def priority_of(self, requested: int | None) -> int:
        """The requested priority, limited to what the API key allows. Batch lines come after everything else."""
        allowed = requested or 0 if self.usage is None else self.usage.key.priority(requested)
        return BATCH_PRIORITY + max(allowed, 0) if self.is_batch_line else allowed

    def may_use(self, name: str) -> bool:
        """Whether the API key may use this model, or an adapter of this name."""
        return self.usage is None or self.usage.key.may_use(name)

    def check_model(self, name: str) -> None:
        """Records the model, which must be a served one. Raises NotAllowedError if the API key may not use it."""
        if self.trace is not None:
            self.trace.model = name
        if self.usage is not None:
            self.usage.model = name
            self.usage.key.check_model(name)

    def use_adapter(self, revision: str, use: contextlib.AbstractContextManager[None]) -> None:
        """The request has this revision of an adapter from now to its end."""
        self.at_end.enter_context(use)
        self.adapters[:] = [revision]

    @property
    def adapter(self) -> str | None:
        return self.adapters[0] if self.adapters else None

    def reserve(self, num_prompt_tokens: int) -> contextlib.AbstractContextManager[None]:
        """Around a generation. Raises OverloadedError if the API key has too few tokens left this minute."""
        return contextlib.nullcontext() if self.usage is None else self.usage.reserve(num_prompt_tokens)

    def add_output_tokens(self, num_tokens: int) -> None:
        """Charges generated tokens as they arrive."""
        if self.usage is not None:
            self.usage.add_output_tokens(num_tokens)

    def add_cached_tokens(self, num_tokens: int) -> None:
        """Counts prompt tokens that the replica had in its prefix cache."""
        if self.usage is not None:
            self.usage.num_cached_tokens += num_tokens

    def ignore(self, *paths: str) -> None:
        """Notes fields of the body that have no effect."""
        self.ignored.extend(path for path in paths if path not in self.ignored)

    @property
    def ignored_text(self) -> str:
        """The ignored fields with commas between them, for a header and for the log; "..." stands for those that do not fit."""
        text = ", ".join(self.ignored)
        if len(text) <= MAX_IGNORED_CHARS:
            return text
        return text[: text.rindex(", ", 0, MAX_IGNORED_CHARS - 3)] + ", ..."

    def mark_failed(self) -> None:
        """A sequence ended with an error, possibly after the response had begun."""
        if self.usage is not None:
            self.usage.failed = True


REQUEST_CONTEXT = web.RequestKey("request_context", RequestContext)
