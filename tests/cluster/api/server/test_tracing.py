"""The spans of a gateway over fake replicas: what a trace tells of a request, of a lost replica, and of work that nobody waits for."""

import asyncio
import contextlib
import io
import json
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import aiohttp
import pytest
from support.fakes.replica import FakeReplica, tokens
from support.paths import DEMO_MODEL
from support.servers.trace_collector import Span, TraceCollector

from cluster.api.app import make_app
from cluster.api.context import CONTEXT
from cluster.api.line_executor import ApiLineExecutor
from cluster.api.server.listener import Listener
from cluster.batch.records import Line
from cluster.router.replica import Availability
from cluster.router.router import Router
from cluster.system.log import JsonFormatter, TextFormatter
from cluster.text.chat.mistral_template import MistralTemplate
from cluster.text.tokenizer import load_tokenizer
from cluster.tracing.origin import Origin, origin_var
from cluster.tracing.request import MAX_SEQUENCES, GatewayTracing
from workers.tracing.settings import TracingConfig

TOKENIZER = load_tokenizer(DEMO_MODEL)
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"
OUTPUT = range(100, 120)


@dataclass
class Gateway:
    """`spans`: closes the tracing and returns all."""

    url: str
    router: Router
    collector: TraceCollector
    tracing: GatewayTracing
    app: Any

    async def post(self, path: str = "/v1/completions", *, traceparent: str | None = TRACEPARENT, **body: Any) -> str:
        headers = {"X-Request-Id": "mine"} | ({} if traceparent is None else {"traceparent": traceparent})
        body = {"model": "demo", "prompt": "x", "max_tokens": 64} | body
        async with (
            aiohttp.ClientSession() as session,
            session.post(self.url + path, json=body, headers=headers) as response,
        ):
            return await response.text()

    async def spans(self) -> list[Span]:
        await asyncio.to_thread(self.tracing.close)
        return sorted(self.collector.spans, key=lambda s: (s.begin_ns, -s.end_ns))


@pytest.fixture
def collector():
    with TraceCollector() as collector:
        yield collector


@contextlib.asynccontextmanager
async def serving(collector: TraceCollector, *replicas: FakeReplica, **environ: str) -> AsyncIterator[Gateway]:
    router = Router(replicas, policy="round_robin")
    config = TracingConfig(url=f"{collector.url}/v1/traces", environ=tuple(environ.items()))
    tracing = GatewayTracing(config, gateway_id="g-1")
    app = make_app(
        router=router, tokenizer=TOKENIZER, chat_template=MistralTemplate(TOKENIZER), model_name="demo", tracing=tracing
    )
    listener = await Listener(app).open("127.0.0.1", 0)
    try:
        yield Gateway(f"http://127.0.0.1:{listener.port}", router, collector, tracing, app)
    finally:
        await listener.close()
        tracing.close()


def replica(name: str = "a", **options: Any) -> FakeReplica:
    return FakeReplica(tokens(OUTPUT), replica_id=name, max_num_seqs=64, **options)


def named(spans: list[Span], name: str) -> list[Span]:
    return [span for span in spans if span.name == name]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_is_one_connected_trace(collector, stream):
    asked = replica()
    async with serving(collector, asked) as gateway:
        await gateway.post(stream=stream, temperature=0.5, seed=7)
        server, generation, route, attempt = await gateway.spans()
    assert [s.name for s in (server, generation, route, attempt)] == [
        "POST /v1/completions", "text_completion demo", "route", "attempt",
    ]  # fmt: skip
    assert {s.trace_id for s in collector.spans} == {TRACE} and server.parent_id == PARENT
    assert generation.parent_id == server.span_id
    assert {route.parent_id, attempt.parent_id} == {generation.span_id}
    assert server.end_ns >= generation.end_ns >= attempt.end_ns > attempt.begin_ns == route.end_ns
    assert (server.kind, attempt.kind) == ("server", "client")
    assert server.attributes["http.response.status_code"] == 200
    assert server.attributes["tramontane.request.id"] == "mine"
    expected = {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "tramontane",
        "gen_ai.request.model": "demo",
        "gen_ai.response.model": "demo",
        "gen_ai.request.max_tokens": 64,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.seed": 7,
        "gen_ai.response.finish_reasons": ["length"],
        "gen_ai.usage.input_tokens": 2,
        "gen_ai.usage.output_tokens": len(OUTPUT),
        "gen_ai.usage.cache_read.input_tokens": 1,
    }
    assert expected.items() <= generation.attributes.items()
    assert generation.attributes["gen_ai.response.id"].startswith("cmpl-")
    assert 0 < generation.attributes["gen_ai.response.time_to_first_chunk"] < 5
    assert route.attributes["tramontane.replica.id"] == attempt.attributes["tramontane.replica.id"] == "a"
    assert asked.requests[0].traceparent == f"00-{TRACE}-{attempt.span_id}-01", "the replica's spans are the attempt's"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "x"}]}),
        ("/v1/responses", {"input": "x", "store": False, "max_output_tokens": 64, "max_tokens": None}),
    ],
)
async def test_the_trace_has_the_id_that_the_client_gets(collector, path, body):
    async with serving(collector, replica()) as gateway:
        answer = json.loads(await gateway.post(path, prompt=None, **body))
        (generation,) = named(await gateway.spans(), "chat demo")
    assert generation.attributes["gen_ai.response.id"] == answer["id"]


@pytest.mark.parametrize("formatter", [TextFormatter, JsonFormatter])
async def test_a_lost_replica_is_seen_and_the_next_attempt_is_linked(collector, formatter):
    log = io.StringIO()
    handler = logging.StreamHandler(log)
    handler.setFormatter(formatter())
    logger = logging.getLogger("cluster.router.router")
    logger.addHandler(handler)
    logger.setLevel("INFO")
    try:
        async with serving(collector, replica("a", lose_after=7), replica("b")) as gateway:
            await gateway.post()
            spans = await gateway.spans()
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
    first, second = named(spans, "attempt")
    assert (first.attributes["tramontane.replica.id"], second.attributes["tramontane.replica.id"]) == ("a", "b")
    assert first.failed and first.message == "Replica a is lost." and first.attributes["tramontane.replica.spans_lost"]
    assert (first.attributes["error.type"], first.attributes["tramontane.output_tokens"]) == ("replica_crashed", 7)
    assert second.links == [first.span_id] and not second.failed
    assert (second.attributes["tramontane.resumed_tokens"], second.attributes["tramontane.output_tokens"]) == (7, 13)
    (generation,) = named(spans, "text_completion demo")
    assert [(name, e["tramontane.failover.reason"]) for name, e in generation.events] == [
        ("failover", "replica_crashed")
    ]
    assert generation.attributes["gen_ai.usage.output_tokens"] == 20 and not generation.failed
    assert len(named(spans, "route")) == 2
    (server,) = named(spans, "POST /v1/completions")
    (line,) = log.getvalue().splitlines()
    ids = {"trace_id": TRACE, "span_id": server.span_id}
    if formatter is JsonFormatter:
        assert ids.items() <= json.loads(line).items()
    else:
        assert line.endswith(f"[mine] [trace_id={TRACE} span_id={server.span_id}]")


async def test_waiting_for_room_and_a_client_that_leaves_are_in_the_trace(collector):
    busy = replica(hold_after=3)
    async with serving(collector, busy) as gateway:
        busy.say(num_waiting=500, num_running=64, num_pending_tokens=10**9)
        busy.reason = "It is not ready."
        gateway.router.update([busy], Availability(expected=True, facts=busy.facts))
        request = asyncio.create_task(gateway.post(stream=True))
        while not gateway.router.num_waiting:
            await asyncio.sleep(0.01)
        busy.reason = None
        busy.say(num_waiting=0, num_running=0, num_pending_tokens=0)
        await busy.holding.wait()
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)
        await asyncio.wait_for(busy.closed.wait(), 5)
        while gateway.router.num_inflight_requests:
            await asyncio.sleep(0.01)
        spans = await gateway.spans()
    (queue,), (route,) = named(spans, "queue"), named(spans, "route")
    assert queue.parent_id == route.span_id and queue.end_ns == route.end_ns
    (server,), (generation,) = named(spans, "POST /v1/completions"), named(spans, "text_completion demo")
    assert server.attributes["tramontane.client_disconnected"] is True and not server.failed
    assert generation.attributes["gen_ai.response.finish_reasons"] == ["abort"]
    assert not generation.failed and not route.failed


async def test_failures_are_told_from_refusals(collector):
    lost = replica("a", lose_after=2)
    async with serving(collector, lost) as gateway:
        await gateway.post(temperature=-1)
        await gateway.post()
        spans = await gateway.spans()
    refused, failed = named(spans, "POST /v1/completions")
    assert (refused.attributes["http.response.status_code"], refused.failed) == (400, False)
    assert (failed.attributes["http.response.status_code"], failed.failed) == (503, True)
    (generation,) = named(spans, "text_completion demo")
    assert generation.failed and generation.attributes["error.type"] == "ReplicaUnavailableError"


async def test_only_sampled_requests_and_the_first_sequences_have_spans(collector):
    asked = replica()
    async with serving(collector, asked, OTEL_TRACES_SAMPLER="parentbased_always_off") as gateway:
        await gateway.post(traceparent=None)
        await gateway.post(traceparent=f"00-{TRACE}-{PARENT}-00")
        assert [r.traceparent for r in asked.requests] == [None, None]
        await gateway.post(n=MAX_SEQUENCES + 2)
        async with aiohttp.ClientSession() as session, session.get(f"{gateway.url}/health/live") as response:
            assert response.status == 200
        spans = await gateway.spans()
    assert len(named(spans, "text_completion demo")) == MAX_SEQUENCES
    (server,) = named(spans, "POST /v1/completions")
    assert server.attributes["tramontane.sequences"] == MAX_SEQUENCES + 2
    assert {s.trace_id for s in spans} == {TRACE}, "what is not sampled, and health, have no spans"


async def test_a_batch_line_has_a_trace_linked_to_the_request_that_made_the_batch(collector):
    async with serving(collector, replica()) as gateway:
        executor = ApiLineExecutor(gateway.app[CONTEXT])
        origin_var.set(Origin("batch_1", TRACEPARENT))
        line = Line(number=3, custom_id="c\ud800", offset=0, num_bytes=1)
        body = json.dumps({"model": "demo", "prompt": "x", "max_tokens": 64}).encode()
        result = await executor.execute(line, endpoint="/v1/completions", body=body, seed=1, owner="")
        assert result.status_code == 200
        spans = await gateway.spans()
    (root,) = named(spans, "batch line")
    assert root.parent_id == "" and root.trace_id != TRACE and root.links == [PARENT]
    assert root.attributes["tramontane.batch.id"] == "batch_1" and root.attributes["tramontane.batch.line"] == 3
    (generation,) = named(spans, "text_completion demo")
    assert generation.parent_id == root.span_id
