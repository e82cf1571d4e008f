"""How spans reach a collector, and that one which is gone delays nothing, is told of once, and costs no memory."""

import logging
import time

import pytest
from support.servers.trace_collector import TraceCollector

from workers.tracing.attributes import number, text
from workers.tracing.log import TraceFormatter, in_trace
from workers.tracing.settings import TracingConfig
from workers.tracing.tracer import Tracer, links_to, remote_parent

REMOTE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def tracer_to(url: str, **environ: str) -> Tracer:
    config = TracingConfig(url=f"{url}/v1/traces", environ=tuple(environ.items()))
    return Tracer(config, role="gateway", instance="g-1")


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name.startswith("workers.") and r.levelno >= logging.WARNING]


def test_spans_arrive_with_their_parents_times_and_attributes():
    with TraceCollector() as collector:
        tracer = tracer_to(
            collector.url,
            OTEL_EXPORTER_OTLP_HEADERS="api-key=secret",
            OTEL_RESOURCE_ATTRIBUTES="deployment.environment=test",
        )
        root = tracer.start("root", remote_parent(REMOTE, "vendor=1"), kind="server", attributes={"n": 3, "of": ["a"]})
        tracer.start("child", root.context, start_ns=1_000, links=links_to(REMOTE)).end(2_000)
        there = remote_parent(root.traceparent)
        tracer.start("elsewhere", there, attributes={"path": text("/\udcff"), "seed": number(2**64)}).end()
        root.end()
        tracer.close()
    spans = {span.name: span for span in collector.spans}
    assert {s.trace_id for s in spans.values()} == {REMOTE.split("-")[1]}
    assert (spans["root"].parent_id, spans["root"].kind) == (REMOTE.split("-")[2], "server")
    assert spans["root"].attributes == {"n": 3, "of": ["a"]}
    assert {spans[name].parent_id for name in ("child", "elsewhere")} == {spans["root"].span_id}
    assert (spans["child"].begin_ns, spans["child"].end_ns) == (1_000, 2_000)
    assert spans["child"].links == [spans["root"].parent_id]
    assert spans["elsewhere"].attributes == {"path": "/\\udcff", "seed": str(2**64)}
    assert collector.paths == ["/v1/traces"] and collector.headers[0]["api-key"] == "secret"
    resource = spans["root"].resource
    assert resource["service.name"] == "tramontane" and resource["deployment.environment"] == "test"
    assert (resource["tramontane.role"], resource["service.instance.id"]) == ("gateway", "g-1")


def test_the_environment_names_the_service_and_chooses_what_is_sampled(monkeypatch):
    monkeypatch.setenv("OTEL_SERVICE_NAME", "ours")
    with TraceCollector() as collector:
        tracer = tracer_to(
            collector.url, OTEL_SERVICE_NAME="of the command", OTEL_TRACES_SAMPLER="parentbased_always_off"
        )
        unsampled = tracer.start("unsampled", None)
        assert unsampled.traceparent[-2:] in ("00", "02") and not unsampled.is_sampled
        unsampled.end()
        tracer.start("sampled by its parent", remote_parent(REMOTE)).end()
        tracer.close()
    assert [span.name for span in collector.spans] == ["sampled by its parent"]
    assert collector.spans[0].resource["service.name"] == "ours", "a machine's own variable wins"


@pytest.mark.parametrize("traceparent", [None, "", "nonsense", "00-" + "0" * 32 + "-" + "1" * 16 + "-01"])
def test_what_is_no_traceparent_has_no_parent(traceparent):
    assert remote_parent(traceparent) is None
    assert links_to(traceparent) == []


def test_a_dead_collector_delays_nothing_and_is_told_of_once(caplog):
    with TraceCollector() as gone:
        url = gone.url
    tracer = tracer_to(url, OTEL_BSP_MAX_QUEUE_SIZE="512", OTEL_BSP_SCHEDULE_DELAY="20")
    began = time.monotonic()
    for i in range(2_000):
        tracer.start(f"span {i}", None).end()
    # One attempt to send, with its pauses, takes longer than all of them may.
    assert time.monotonic() - began < 10.0, "ending a span waited for the collector"
    deadline = time.monotonic() + 30
    while not said(caplog) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert tracer.num_dropped >= 2_000 - 2 * 512, "more is kept than the queue and a batch hold"
    began = time.monotonic()
    tracer.close(0.3)
    assert time.monotonic() - began < 10.0
    (told,) = said(caplog)
    assert f"{url}/v1/traces" in told and "refused" in told


def test_a_collector_that_refuses_is_told_of_and_so_is_its_return(caplog):
    with TraceCollector(status=401) as collector:
        tracer = tracer_to(collector.url, OTEL_BSP_SCHEDULE_DELAY="10")
        tracer.start("lost", None).end()
        collector.wait_for(lambda: tracer.num_dropped, what="a refusal")
        collector.status = 200
        tracer.start("arrives", None).end()
        collector.wait_for(lambda: collector.spans)
        tracer.close()
    assert tracer.num_dropped == 1 and [s.name for s in collector.spans] == ["arrives"]
    first, second = said(caplog)
    assert "401" in first and "again. 1 spans were dropped" in second


def test_what_may_be_secret_is_not_shown():
    config = TracingConfig(url="https://user:password@host:4318/v1/traces?key=1", environ=(("OTEL_X", "secret"),))
    assert config.shown_url == "https://host:4318/v1/traces"
    assert "secret" not in repr(config) and "password" not in repr(config)
    assert config.for_display() == TracingConfig(url=config.shown_url)


def test_lines_of_a_rank_name_their_trace():
    formatter = TraceFormatter("%(levelname)s %(message)s")
    for traceparent, line in (
        (None, "ERROR ended"),
        (REMOTE, "ERROR ended [trace_id=0af7651916cd43dd8448eb211c80319c span_id=b7ad6b7169203331]"),
    ):
        record = logging.getLogger("x").makeRecord(
            "x", logging.ERROR, "f", 1, "ended", (), None, extra=in_trace(traceparent)
        )
        assert formatter.format(record) == line
