"""The spans of requests on rank 0: queue, prefill and decode, children of the gateway's attempt.

They are made when a request ends, from the times of its four events, so that a token costs nothing. Knows tracers, and of a request how
many tokens it has; knows no scheduler and no torch. Times are Unix nanoseconds.
"""

import time
from collections.abc import Callable
from typing import Protocol

from workers.protocol import FinishReason, GenerateRequest
from workers.tracing.attributes import Attributes, Value
from workers.tracing.tracer import Tracer, remote_parent


class Progress(Protocol):
    """What the spans say of a request; `workers.engine.scheduling.request.Request` is one."""

    num_prompt_tokens: int
    num_cached_tokens: int | None
    num_preemptions: int
    num_prompt_chunks: int

    @property
    def num_output_tokens(self) -> int: ...


class RequestSpans:
    """The times of one request. `EngineSpans.begin` makes it; the engine calls a method at each event."""

    __slots__ = (
        "_arrived_ns",
        "_before",
        "_cached",
        "_chunks",
        "_first_token_ns",
        "_is_over",
        "_owner",
        "_request",
        "_started_ns",
        "traceparent",
    )

    def __init__(self, owner: "EngineSpans", traceparent: str, arrived_ns: int) -> None:
        self.traceparent = traceparent
        self._owner = owner
        self._arrived_ns = arrived_ns
        self._started_ns = self._first_token_ns = 0
        self._before = 0  # output tokens that other replicas generated
        self._cached = self._chunks = 0
        self._is_over = False
        self._request: Progress | None = None  # while it runs

    def start(self, request: Progress) -> None:
        """The scheduler lets it run."""
        self._started_ns = time.time_ns()
        self._request = request
        self._before = request.num_output_tokens
        self._cached = request.num_cached_tokens or 0
        self._owner.prefilling.append(self)

    def is_prefilled(self, now_ns: int) -> bool:
        """Whether its first token is there, since `now_ns` if that is new, or it has ended."""
        request = self._request
        if request is None:
            return True
        if request.num_output_tokens > self._before:
            self._first_token_ns, self._chunks = now_ns, request.num_prompt_chunks
        return self._first_token_ns != 0

    def end(self, request: Progress, reason: FinishReason = FinishReason.ABORT) -> None:
        """Makes the spans. The first call counts."""
        if self._is_over:
            return
        self._is_over, self._request = True, None
        now_ns = time.time_ns()
        add = self._owner.adding_to(self.traceparent)
        finish: dict[str, Value] = {"tramontane.finish_reason": reason.value}
        if not self._started_ns:
            add("queue", self._arrived_ns, now_ns, finish)
            return
        add("queue", self._arrived_ns, self._started_ns, {})
        prefill: dict[str, Value] = {
            "tramontane.prompt_tokens": request.num_prompt_tokens + self._before,
            "tramontane.cached_tokens": self._cached,
            "tramontane.prefill.chunks": max(1, self._chunks or request.num_prompt_chunks),
        }
        if not self._first_token_ns:  # a request of one token ends with its prompt
            add("prefill", self._started_ns, now_ns, prefill | finish)
            return
        decode: dict[str, Value] = {
            "tramontane.output_tokens": request.num_output_tokens - self._before,
            "tramontane.preemptions": request.num_preemptions,
        }
        add("prefill", self._started_ns, self._first_token_ns, prefill)
        add("decode", self._first_token_ns, now_ns, decode | finish)


class EngineSpans:
    """`prefilling`: requests that run and have no token yet. All but what `noting_arrival` returns is for the engine thread."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer
        self._arrived_ns: dict[str, int] = {}
        self.prefilling: list[RequestSpans] = []

    def noting_arrival(self, submit: Callable[[GenerateRequest], None]) -> Callable[[GenerateRequest], None]:
        """`submit`, which also notes when a request came: the engine takes it after its step only."""

        def noted(request: GenerateRequest) -> None:
            if request.traceparent is not None:
                self._arrived_ns[request.request_id] = time.time_ns()
            submit(request)

        return noted

    def begin(self, message: GenerateRequest) -> RequestSpans | None:
        """None for a request that is not traced."""
        if message.traceparent is None:
            return None
        arrived_ns = self._arrived_ns.pop(message.request_id, None) or time.time_ns()
        return RequestSpans(self, message.traceparent, arrived_ns)

    def after_step(self) -> None:
        """Call it after a step where `prefilling` is not empty."""
        now_ns = time.time_ns()
        self.prefilling = [spans for spans in self.prefilling if not spans.is_prefilled(now_ns)]

    def adding_to(self, traceparent: str) -> Callable[[str, int, int, Attributes], None]:
        """A function that makes a span which is over, as a child of that one: its name, beginning, end and attributes."""
        parent = remote_parent(traceparent)

        def add(name: str, start_ns: int, end_ns: int, attributes: Attributes) -> None:
            if parent is not None:
                self._tracer.start(name, parent, start_ns=start_ns, attributes=attributes).end(end_ns)

        return add
