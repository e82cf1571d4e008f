"""A collector of traces: takes OTLP over HTTP as OpenTelemetry's own collector does, and keeps the spans.

python -m support.servers.trace_collector 4318      # in tests/: prints each trace as a tree when its spans have come
"""

import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span as SpanMessage
from opentelemetry.proto.trace.v1.trace_pb2 import Status

KINDS = {SpanMessage.SPAN_KIND_SERVER: "server", SpanMessage.SPAN_KIND_CLIENT: "client"}


@dataclass(frozen=True)
class Span:
    """Ids in hexadecimal digits, as in logs; `parent_id` "" for a root. Times in Unix nanoseconds. `links`: ids of linked spans."""

    trace_id: str
    span_id: str
    parent_id: str
    name: str
    kind: str
    begin_ns: int
    end_ns: int
    attributes: dict[str, Any]
    resource: dict[str, Any]
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    failed: bool = False
    message: str = ""

    @property
    def role(self) -> str:
        return self.resource["tramontane.role"]

    @property
    def instance(self) -> str:
        return self.resource["service.instance.id"]


class TraceCollector:
    """Listens from the start, on loopback. `spans`: all so far. status: of the answers."""

    def __init__(self, port: int = 0, *, status: int = 200) -> None:
        self.spans: list[Span] = []
        self.paths: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.status = status
        self._server = ThreadingHTTPServer(("127.0.0.1", port), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)

    def trace(self, trace_id: str) -> list[Span]:
        return sorted((s for s in list(self.spans) if s.trace_id == trace_id), key=lambda s: s.begin_ns)

    def named(self, name: str) -> list[Span]:
        return [span for span in list(self.spans) if span.name == name]

    def wait_for(self, condition: Callable[[], object], *, timeout_s: float = 20.0, what: str = "spans") -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, (
                f"{what} did not come in {timeout_s:g} s; there are:\n{tree(self.spans)}"
            )
            time.sleep(0.02)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        collector = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                data = self.rfile.read(int(self.headers["Content-Length"]))
                collector.paths.append(self.path)
                collector.headers.append({k.lower(): v for k, v in self.headers.items()})
                if collector.status == 200:
                    collector.spans += spans_of(ExportTraceServiceRequest.FromString(data))
                answer = ExportTraceServiceResponse().SerializeToString()
                self.send_response(collector.status)
                self.send_header("Content-Type", "application/x-protobuf")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: object) -> None: ...

        return Handler


def spans_of(request: ExportTraceServiceRequest) -> list[Span]:
    """All spans of one message."""
    return [
        Span(
            trace_id=s.trace_id.hex(),
            span_id=s.span_id.hex(),
            parent_id=s.parent_span_id.hex(),
            name=s.name,
            kind=KINDS.get(s.kind, "internal"),
            begin_ns=s.start_time_unix_nano,
            end_ns=s.end_time_unix_nano,
            attributes=values(s.attributes),
            resource=values(group.resource.attributes),
            events=[(e.name, values(e.attributes)) for e in s.events],
            links=[link.span_id.hex() for link in s.links],
            failed=s.status.code == Status.STATUS_CODE_ERROR,
            message=s.status.message,
        )
        for group in request.resource_spans
        for scope in group.scope_spans
        for s in scope.spans
    ]


def values(attributes: Any) -> dict[str, Any]:
    return {a.key: _value(a.value) for a in attributes}


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    return [_value(v) for v in value.array_value.values] if kind == "array_value" else getattr(value, str(kind))


def tree(spans: list[Span]) -> str:
    """Traces as indented lines: name, instance, milliseconds from the beginning of the trace, attributes, events, failure."""
    by_id = {span.span_id: span for span in spans}
    lines: list[str] = []

    def add(span: Span, depth: int, zero_ns: int) -> None:
        times = f"{(span.begin_ns - zero_ns) / 1e6:.1f} to {(span.end_ns - zero_ns) / 1e6:.1f} ms"
        said = " ".join(f"{k}={v}" for k, v in span.attributes.items())
        lines.append(f"{'  ' * depth}{span.name} [{span.instance}] {times} {said}")
        if span.failed:
            lines.append(f"{'  ' * depth}  ! {span.message}")
        lines.extend(f"{'  ' * depth}  * {name} {attributes}" for name, attributes in span.events)
        for child in sorted((s for s in spans if s.parent_id == span.span_id), key=lambda s: s.begin_ns):
            add(child, depth + 1, zero_ns)

    for span in sorted(spans, key=lambda s: s.begin_ns):
        if span.parent_id not in by_id:
            lines.append(f"trace {span.trace_id}" + (f", parent {span.parent_id} elsewhere" if span.parent_id else ""))
            add(span, 1, span.begin_ns)
    return "\n".join(lines)


if __name__ == "__main__":
    with TraceCollector(int(sys.argv[1]) if len(sys.argv) > 1 else 4318) as running:
        print(f"Listening at {running.url}", flush=True)
        shown, count = 0, 0
        while True:
            time.sleep(2.5)
            if len(running.spans) == count and count > shown:
                print(tree(running.spans[shown:count]), flush=True)
                shown = count
            count = len(running.spans)
