"""Between the spans of a process and the collector: a bounded queue, and what is said and counted when the collector does not take them.

Imports OpenTelemetry's SDK; only tracer.py imports this file, and late. The library would write a line for every failed attempt; here the
first of an outage is logged with its reason, and the end of it.
"""

import logging
import os
from collections.abc import Callable, Sequence

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode

from workers.tracing.attributes import Attributes

log = logging.getLogger(__name__)

MAX_QUEUED_SPANS = 8192
# Soon, so that little is lost with a process that is killed.
SEND_EVERY_MS = 1000
_EXPORTERS_LOGGER = "opentelemetry.exporter.otlp.proto.http"


class Delivery(SpanExporter):
    """Sends batches over OTLP/HTTP. `num_taken`: spans it was given; `num_dropped`: of these, those that did not arrive."""

    def __init__(self, url: str, *, shown_url: str) -> None:
        self._url = shown_url
        self._exporter = OTLPSpanExporter(endpoint=url)
        self._fails = False
        self._reasons = _Reasons(self._failed)
        library = logging.getLogger(_EXPORTERS_LOGGER)
        library.addHandler(self._reasons)
        library.addHandler(logging.NullHandler())  # for what is said after the end
        library.propagate = False
        logging.getLogger("opentelemetry.sdk").setLevel(logging.ERROR)  # a full queue is counted
        self._is_closed = False
        self.num_taken = 0
        self.num_dropped = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Called on the queue's thread. Tries again for as long as OTEL_EXPORTER_OTLP_TIMEOUT says."""
        self.num_taken += len(spans)
        result = self._exporter.export(spans)
        if result is not SpanExportResult.SUCCESS:
            self.num_dropped += len(spans)
        elif self._fails:
            self._fails = False
            log.warning("Traces reach %s again. %d spans were dropped.", self._url, self.num_dropped)
        return result

    def shutdown(self) -> None:
        """Ends the attempts to send."""
        self.close()

    def close(self) -> None:
        """As `shutdown`; idempotent."""
        if not self._is_closed:
            self._is_closed = True
            self._exporter.shutdown()
            logging.getLogger(_EXPORTERS_LOGGER).removeHandler(self._reasons)

    def _failed(self, reason: str) -> None:
        if not self._fails and not self._is_closed:
            self._fails = True
            log.warning(
                "Traces cannot be sent to %s; requests are served as before, and spans are dropped until it works again. %s",
                self._url, reason,
            )  # fmt: skip


class SpanQueue(BatchSpanProcessor):
    """Hands spans to the delivery in batches, on a thread of its own. One thread at a time ends spans."""

    def __init__(self, delivery: Delivery) -> None:
        self._delivery = delivery
        self._max_spans = _number("OTEL_BSP_MAX_QUEUE_SIZE", MAX_QUEUED_SPANS)
        self._num_ended = 0
        self.num_dropped = 0
        super().__init__(
            delivery,
            max_queue_size=self._max_spans,
            schedule_delay_millis=_number("OTEL_BSP_SCHEDULE_DELAY", SEND_EVERY_MS),
        )

    def on_end(self, span: ReadableSpan) -> None:
        """When it is full, the oldest span makes room."""
        self._num_ended += 1
        if self._num_ended - self._delivery.num_taken - self.num_dropped > self._max_spans:
            self.num_dropped += 1
        super().on_end(span)


class SpanMaker:
    """Makes the SDK's spans from ours, as its `Tracer` does in more steps."""

    def __init__(self, resource: Resource, version: str) -> None:
        self._resource = resource
        self._scope = InstrumentationScope("tramontane", version)

    def __call__(
        self,
        name: str,
        context: SpanContext,
        parent: SpanContext | None,
        *,
        kind: SpanKind,
        times: tuple[int, int],
        attributes: Attributes,
        events: Sequence[tuple[str, Attributes, int]],
        links: Sequence[Link],
        failure: tuple[str | None] | None,
    ) -> ReadableSpan:
        """failure: the message of one that has failed."""
        return ReadableSpan(
            name,
            context,
            parent,
            self._resource,
            attributes,
            [Event(event, more, when_ns) for event, more, when_ns in events],
            links,
            kind,
            status=_UNSET if failure is None else Status(StatusCode.ERROR, failure[0]),
            start_time=times[0],
            end_time=times[1],
            instrumentation_scope=self._scope,
        )


_UNSET = Status()


class _OneResource(Resource):
    """A process has one. The exporter groups spans by it, and a Resource's hash is that of its JSON, made again for each span."""

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other


def resource(ours: Attributes) -> Resource:
    """What made the spans: what OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES say, and `ours`."""
    found = dict(Resource.create().attributes)
    if str(found.get("service.name", "unknown_service")).startswith("unknown_service"):
        found["service.name"] = "tramontane"
    return _OneResource({**found, **ours})


class _Reasons(logging.Handler):
    """Passes on what the library says about attempts that failed."""

    def __init__(self, failed: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._failed = failed

    def emit(self, record: logging.LogRecord) -> None:
        self._failed(record.getMessage())


def _number(name: str, default: int) -> int:
    """A variable of the environment; the default where it is missing or no positive number."""
    text = os.environ.get(name, "").strip()
    return int(text) if text.isdecimal() and int(text) > 0 else default
