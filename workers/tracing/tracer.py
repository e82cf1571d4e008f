"""Makes the spans of one process and sends them to a collector, from a thread of its own.

Knows OpenTelemetry's SDK, which it imports when a tracer is made, because that takes a third of a second. Knows no request and no HTTP.
A collector that is slow or gone delays nothing: the queue is bounded, and what does not fit is dropped and counted (export.py).
A span is a plain object that becomes one of the SDK's when it ends: those of its `Tracer` cost three times as much CPU time.
"""

import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING, Literal

from workers.errors import ConfigError
from workers.tracing.attributes import Attributes, Value, text
from workers.tracing.settings import TracingConfig

if TYPE_CHECKING:
    from opentelemetry.trace import Link, SpanContext

# At the end, for what is still in the queue.
FLUSH_S = 2.0

Kind = Literal["internal", "server", "client"]


class Span:
    """One that has begun. `context`: as a parent, and for links. It costs almost nothing where its trace is not sampled.

    Times are Unix nanoseconds.
    """

    __slots__ = (
        "_attributes",
        "_events",
        "_failure",
        "_kind",
        "_links",
        "_name",
        "_parent",
        "_start_ns",
        "_tracer",
        "context",
    )

    def __init__(
        self,
        tracer: "Tracer | None",
        context: "SpanContext",
        parent: "SpanContext | None",
        name: str,
        kind: Kind,
        start_ns: int,
        attributes: Attributes | None,
        links: "Sequence[Link]",
    ) -> None:
        self._tracer = tracer  # None: it has ended, or is not sampled
        self.context = context
        self._parent = parent
        self._name = name
        self._kind = kind
        self._start_ns = start_ns
        self._attributes: dict[str, Value] = {} if attributes is None else dict(attributes)
        self._links = links
        self._events: list[tuple[str, Attributes, int]] = []
        self._failure: tuple[str | None] | None = None

    @property
    def is_sampled(self) -> bool:
        return self.context.trace_flags.sampled

    @property
    def traceparent(self) -> str:
        """For another process, as W3C's Trace Context writes it."""
        context = self.context
        return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"

    def add(self, attributes: Attributes) -> None:
        """More attributes."""
        self._attributes.update(attributes)

    def add_event(self, name: str, attributes: Attributes) -> None:
        """Something that happened now."""
        self._events.append((name, attributes, time.time_ns()))

    def fail(self, error: str, message: str | None = None) -> None:
        """error: the kind of failure, one of few. message: for people."""
        self._attributes["error.type"] = error
        self._failure = (None if message is None else text(message),)

    def end(self, end_ns: int | None = None) -> None:
        """Sends it soon. end_ns: None: now. Idempotent."""
        tracer, self._tracer = self._tracer, None
        if tracer is not None:
            tracer._ended(self, time.time_ns() if end_ns is None else end_ns)


class Tracer:
    """role: "gateway" or "replica". instance: which one, unique in the deployment. `close` it at the end.

    Raises ConfigError for variables of the environment that the SDK does not accept.
    """

    def __init__(self, config: TracingConfig, *, role: str, instance: str) -> None:
        from opentelemetry import trace
        from opentelemetry.sdk.trace import TracerProvider

        from workers.tracing.export import Delivery, SpanMaker, SpanQueue, resource

        self._kinds = {
            "internal": trace.SpanKind.INTERNAL,
            "server": trace.SpanKind.SERVER,
            "client": trace.SpanKind.CLIENT,
        }
        ours: dict[str, Value] = {
            "service.instance.id": instance,
            "tramontane.role": role,
            "host.name": socket.gethostname(),
            "process.pid": os.getpid(),
        }
        with _environment(config.environ):
            try:
                self._delivery = Delivery(config.url, shown_url=config.shown_url)
                self._queue = SpanQueue(self._delivery)
                made_of = resource(ours)
                self._provider = TracerProvider(resource=made_of, shutdown_on_exit=False)
            except ValueError as e:
                raise ConfigError(
                    f"OpenTelemetry does not accept its settings: {e}", remedy="Look at the variables OTEL_*."
                ) from e
        self._make = SpanMaker(made_of, version("tramontane"))
        self._sampler, self._ids = self._provider.sampler, self._provider.id_generator
        self._is_closed = False

    def start(
        self,
        name: str,
        parent: "SpanContext | None",
        *,
        kind: Kind = "internal",
        start_ns: int | None = None,
        attributes: Attributes | None = None,
        links: "Sequence[Link]" = (),
    ) -> Span:
        """The caller ends it. parent: another span's `context`, or `remote_parent`; None begins a new trace. start_ns: None: now."""
        from opentelemetry.trace import SpanContext

        begin_ns = time.time_ns() if start_ns is None else start_ns
        if parent is None or parent.is_remote:
            trace_id = self._ids.generate_trace_id() if parent is None else parent.trace_id
            flags, state = self._sample(name, parent, trace_id, kind, attributes, links)
        else:
            trace_id, flags, state = parent.trace_id, parent.trace_flags, parent.trace_state
        context = SpanContext(trace_id, self._ids.generate_span_id(), False, flags, state)
        return Span(self if flags.sampled else None, context, parent, name, kind, begin_ns, attributes, links)

    @property
    def num_dropped(self) -> int:
        """Spans that the collector has not got and will not get."""
        return self._queue.num_dropped + self._delivery.num_dropped

    def close(self, timeout_s: float = FLUSH_S) -> None:
        """Sends what is left, for at most `timeout_s`. Idempotent; spans that end later are dropped."""
        if self._is_closed:
            return
        self._is_closed = True
        sending = threading.Thread(target=self._queue.shutdown, name="last spans", daemon=True)
        sending.start()
        sending.join(timeout_s)
        self._delivery.close()

    def _sample(
        self,
        name: str,
        parent: "SpanContext | None",
        trace_id: int,
        kind: Kind,
        attributes: Attributes | None,
        links: "Sequence[Link]",
    ) -> tuple:  # type: ignore[type-arg]  # of TraceFlags and TraceState, which are imported late
        """As OTEL_TRACES_SAMPLER says: for the first span of a trace in this process. The others follow it."""
        from opentelemetry.context import Context
        from opentelemetry.trace import NonRecordingSpan, TraceFlags, set_span_in_context

        context = Context() if parent is None else set_span_in_context(NonRecordingSpan(parent), Context())
        result = self._sampler.should_sample(context, trace_id, name, self._kinds[kind], attributes, links)
        return TraceFlags(
            TraceFlags.SAMPLED if result.decision.is_sampled() else TraceFlags.DEFAULT
        ), result.trace_state

    def _ended(self, span: Span, end_ns: int) -> None:
        if not self._is_closed:
            self._queue.on_end(
                self._make(
                    span._name,
                    span.context,
                    span._parent,
                    kind=self._kinds[span._kind],
                    times=(span._start_ns, end_ns),
                    attributes=span._attributes,
                    events=span._events,
                    links=span._links,
                    failure=span._failure,
                )
            )


def remote_parent(traceparent: str | None, tracestate: str | None = None) -> "SpanContext | None":
    """As a parent: the span that another process names in the headers of W3C's Trace Context. None if there is none, or it is malformed."""
    from opentelemetry.trace import get_current_span
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    if not traceparent:
        return None
    carrier = {"traceparent": traceparent} | ({"tracestate": tracestate} if tracestate else {})
    context = get_current_span(TraceContextTextMapPropagator().extract(carrier)).get_span_context()
    return context if context.is_valid else None


def link(context: "SpanContext", **attributes: str) -> "Link":
    """A link to a span."""
    from opentelemetry.trace import Link

    return Link(context, attributes)


def links_to(traceparent: str | None) -> "list[Link]":
    """A link to the span that `traceparent` names; none where there is no such span."""
    context = remote_parent(traceparent)
    return [] if context is None else [link(context)]


@contextmanager
def _environment(given: Sequence[tuple[str, str]]) -> Iterator[None]:
    """With these variables, which the SDK reads while it is set up. A variable of this machine's own wins."""
    added = {name: value for name, value in given if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
