"""One trace's part at a gateway: the span of an HTTP request, a batch line or a stored response, and the spans of its sequences.

Knows the conventions of OpenTelemetry for HTTP. Knows no HTTP library: the middleware passes on what it has.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from cluster.system.log import TraceIds
from cluster.tracing.sequence import SequenceTrace
from workers.protocol import GenerateRequest
from workers.tracing.attributes import Attributes
from workers.tracing.settings import TracingConfig
from workers.tracing.tracer import Span, Tracer, links_to, remote_parent

if TYPE_CHECKING:
    from opentelemetry.trace import SpanContext

# A request may have 2,048 inputs or 128 sequences; the first ones stand for the others.
MAX_SEQUENCES = 16


class RequestTrace:
    """`ids`: for the log. `traceparent`: for spans elsewhere, and for links. `model`: what the request asked for.

    span: the one that this makes; None if `parent` belongs to another part of the trace. operation: GenAI's word for what is done.
    """

    def __init__(
        self, tracer: Tracer, span: Span | None, parent: "SpanContext", *, traceparent: str, operation: str
    ) -> None:
        self.model = ""
        self.traceparent = traceparent
        _, trace_id, span_id, flags = traceparent.split("-")
        self.ids = TraceIds(trace_id, span_id)
        self._is_sampled = int(flags, 16) & 1 == 1
        self._tracer = tracer
        self._span = span
        self._parent = parent
        self._operation = operation
        self._num_sequences = 0
        self._is_over = False

    def sequence(self, request: GenerateRequest) -> SequenceTrace | None:
        """The spans of one sequence. None if the trace is not sampled, or if it has enough of them."""
        self._num_sequences += 1
        if not self._is_sampled or self._num_sequences > MAX_SEQUENCES:
            return None
        return SequenceTrace(self._tracer, self._parent, request, operation=self._operation, model=self.model)

    def end(self, attributes: Attributes, *, error: str | None = None) -> None:
        """error: the kind of failure that is the server's, if there was one. The first call counts."""
        if self._is_over or self._span is None:
            return
        self._is_over = True
        self._span.add(attributes)
        if self._num_sequences > 1:
            self._span.add({"tramontane.sequences": self._num_sequences})
        if error is not None:
            self._span.fail(error)
        self._span.end()

    def end_response(self, status: int, *, disconnected: bool) -> None:
        """The end of an HTTP request: its last byte was sent, or its client has gone."""
        attributes: dict[str, str | bool | int] = {"http.response.status_code": status}
        if disconnected:
            attributes["tramontane.client_disconnected"] = True
        self.end(attributes, error=str(status) if status >= 500 else None)


class GatewayTracing:
    """`close` it at the end; that takes FLUSH_S at most."""

    def __init__(self, config: TracingConfig, *, gateway_id: str) -> None:
        self._tracer = Tracer(config, role="gateway", instance=gateway_id)

    @property
    def num_dropped(self) -> int:
        """Spans that the collector has not got."""
        return self._tracer.num_dropped

    def close(self) -> None:
        self._tracer.close()

    def http_request(
        self, route: str, *, method: str, attributes: Attributes, headers: Mapping[str, str]
    ) -> RequestTrace:
        """The span of a request that has arrived. headers: for those of W3C's Trace Context."""
        parent = remote_parent(headers.get("traceparent"), headers.get("tracestate"))
        all_attributes = {"http.request.method": method, "http.route": route, **attributes}
        span = self._tracer.start(f"{method} {route}", parent, kind="server", attributes=all_attributes)
        return self._of_span(span, operation=operation_of(route))

    def background(self, name: str, *, endpoint: str, attributes: Attributes, created_by: str | None) -> RequestTrace:
        """A trace of its own for work that nobody waits for. created_by: the traceparent of the request that asked for it."""
        span = self._tracer.start(name, None, attributes=attributes, links=links_to(created_by))
        return self._of_span(span, operation=operation_of(endpoint))

    def continuing(self, traceparent: str, *, endpoint: str) -> RequestTrace | None:
        """For work on behalf of a request whose span is made elsewhere."""
        parent = remote_parent(traceparent)
        if parent is None:
            return None
        return RequestTrace(self._tracer, None, parent, traceparent=traceparent, operation=operation_of(endpoint))

    def _of_span(self, span: Span, *, operation: str) -> RequestTrace:
        return RequestTrace(self._tracer, span, span.context, traceparent=span.traceparent, operation=operation)


def open_tracing(config: TracingConfig | None, *, gateway_id: str) -> GatewayTracing | None:
    """None where nothing is traced."""
    return None if config is None else GatewayTracing(config, gateway_id=gateway_id)


def operation_of(route: str) -> str:
    """`gen_ai.operation.name` of what an endpoint does."""
    if route.endswith(("/embeddings", "/moderations", "/rerank")):
        return "embeddings"
    is_completion = route.endswith(("/completions", "/score")) and not route.endswith("/chat/completions")
    return "text_completion" if is_completion else "chat"
