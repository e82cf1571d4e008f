"""Real ranks are killed and frozen under running streams: clients get the same answers as without, and the gang is replaced.

`make test` cuts at two points, one for each rank, and freezes rank 0; `make test-chaos` cuts at all 64 and freezes both. The server sends
its traces to a collector, which gets one connected trace of a request whose replica was killed.
"""

import json
import os
import signal
import threading
import time
import urllib.request
from collections.abc import Iterator

import pytest
from support.servers.system_server import Server
from support.servers.trace_collector import TraceCollector, tree

NUM_TOKENS = 64
REQUESTS = {
    "greedy": {"temperature": 0, "ignore_eos": True},
    "seeded": {"temperature": 1.0, "seed": 11, "ignore_eos": True, "frequency_penalty": 0.3},
    "logprobs": {"temperature": 1.0, "seed": 12, "ignore_eos": True, "logprobs": 3},
    "stop": {"temperature": 0.9, "seed": 13, "ignore_eos": True, "min_tokens": 4},  # gets a stop string below
}


@pytest.fixture(scope="module")
def collector() -> Iterator[TraceCollector]:
    with TraceCollector() as collector:
        yield collector


@pytest.fixture(scope="module")
def server(collector) -> Iterator[Server]:
    options = ("--replicas", "2", "--tensor-parallel-size", "2", "--drain-timeout", "5")
    server = Server(*options, "--otlp-endpoint", collector.url, "--log-level", "info", "--log-format", "json")
    try:
        server.wait_ready(2)
        yield server
    finally:
        server.kill()


@pytest.fixture(scope="module")
def undisturbed(server) -> dict[str, tuple[dict, dict]]:
    """(body, answer) of each request. The stop string begins inside one token and ends inside a later one, near the end."""
    found = {}
    for name, options in REQUESTS.items():
        body = {"prompt": f"# {name}\ndef function(self, value):\n", "max_tokens": NUM_TOKENS, **options}
        answer = server.complete(**body)
        if name == "stop":
            text = answer["choices"][0]["text"]
            body["stop"] = [text[-12:-6]]
            answer = server.complete(**body)
            assert answer["choices"][0]["finish_reason"] == "stop"
        found[name] = (body, answer)
    return found


def comparable(answer: dict) -> tuple:
    choice = answer["choices"][0]
    return choice["text"], choice["finish_reason"], choice["logprobs"], answer["usage"]["completion_tokens"]


def is_busy() -> bool:
    """Whether more processes want a core than there are cores."""
    return os.getloadavg()[0] > os.cpu_count()


class Client(threading.Thread):
    """One request on a thread; `index` counts the chunks so far."""

    def __init__(self, server: Server, body: dict, *, stream: bool) -> None:
        super().__init__(daemon=True)
        self._server, self._body, self._stream = server, body, stream
        self.index = 0
        self.answer: dict | None = None
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self.answer = self._read() if self._stream else self._server.complete(**self._body)
        except Exception as e:  # the test reports it
            self.error = e

    def _read(self) -> dict:
        text, reason, logprobs, usage = "", None, None, None
        for event in self._server.stream(**self._body, stream_options={"include_usage": True}):
            usage = event.get("usage") or usage
            for choice in event["choices"]:
                self.index += 1
                text += choice["text"]
                reason = choice["finish_reason"] or reason
                if choice["logprobs"]:
                    logprobs = logprobs or {name: [] for name in choice["logprobs"]}
                    for name, values in choice["logprobs"].items():
                        logprobs[name] += values
        return {"choices": [{"text": text, "finish_reason": reason, "logprobs": logprobs}], "usage": usage}


def cut(server: Server, undisturbed: dict, index: int) -> None:
    """Runs all requests at once, streaming and not. A rank of the busiest replica is killed when the first stream has `index` chunks."""
    server.wait_ready(2)
    clients = {
        (name, stream): Client(server, body, stream=stream)
        for name, (body, _) in undisturbed.items()
        for stream in (True, False)
    }
    leader = clients["greedy", True]
    server.wait_for(lambda: leader.index >= index or not leader.is_alive(), timeout_s=60, what=f"stream {index} chunks")
    busiest = max(server.replicas("ready").values(), key=lambda r: r["load"]["num_running"])
    server.rank(busiest["replica_id"], index % 2).kill()
    for (name, stream), client in clients.items():
        client.join(100)
        assert client.error is None, f"{name}, stream={stream}, cut at {index}: {client.error!r}\n{server.output}"
        assert client.answer is not None, f"{name}, stream={stream}, cut at {index}: no answer"
        assert comparable(client.answer) == comparable(undisturbed[name][1]), f"{name}, stream={stream}, cut at {index}"


@pytest.mark.timeout(300)
def test_a_rank_killed_under_streams_changes_no_byte(server, undisturbed):
    before = server.metric("num_failovers_total")
    for index in (0, 17):
        cut(server, undisturbed, index)
    for _ in range(5):  # on a busy machine all streams may have ended before the kill
        if server.metric("num_failovers_total") == before:
            cut(server, undisturbed, 5)
    assert server.metric("num_failovers_total") > before, "no stream was interrupted, so this run shows nothing"
    assert server.metric("num_failovers_other_numerics_total") == 0, "replicas of one machine compute the same"


def test_one_connected_trace_goes_through_a_killed_replica(server, collector):
    server.wait_ready(2)
    trace_id, parent, num_tokens = "5a" * 16, "b7" * 8, 500
    body = {"prompt": "import os\n", "max_tokens": num_tokens, "seed": 3, "ignore_eos": True, "stream": True}
    request = server.request(body)
    request.add_header("traceparent", f"00-{trace_id}-{parent}-01")
    request.add_header("X-Tramontane-Debug", "1")
    leads = {replica: server.rank(replica, 0) for replica in server.replicas("ready")}
    with urllib.request.urlopen(request, timeout=60) as response:  # the headers come with the first token
        killed = response.headers["X-Tramontane-Replica"]
        leads[killed].kill()
        assert response.read().endswith(b"data: [DONE]\n\n")
    (survivor,) = leads.keys() - {killed}

    def has_all() -> bool:
        return {"POST /v1/completions", "decode"} <= {span.name for span in collector.trace(trace_id)}

    collector.wait_for(has_all, what="the trace")
    spans = collector.trace(trace_id)
    told = tree(spans)
    ids = {span.span_id: span for span in spans}
    (root,) = [span for span in spans if span.parent_id not in ids]
    assert (root.name, root.parent_id) == ("POST /v1/completions", parent), told
    by_name = {name: [s for s in spans if s.name == name] for name in ("attempt", "prefill", "decode", "route")}
    first, second = by_name["attempt"]
    assert first.attributes["tramontane.replica.id"] == killed and first.failed, told
    assert first.attributes["tramontane.replica.spans_lost"] is True, told
    assert second.attributes["tramontane.replica.id"] == survivor and second.links == [first.span_id], told
    (generation,) = [s for s in spans if s.name == "text_completion demo_model"]
    assert {s.parent_id for s in (first, second, *by_name["route"])} == {generation.span_id}, told
    assert [name for name, _ in generation.events] == ["failover"], told
    assert generation.attributes["gen_ai.usage.output_tokens"] == num_tokens, told
    made = [s.attributes["tramontane.output_tokens"] for s in (first, second, *by_name["decode"])]
    assert made[0] + made[1] == num_tokens and made[2] == made[1], told
    for span in (*by_name["prefill"], *by_name["decode"]):
        assert span.parent_id == second.span_id and span.instance.startswith(survivor) and span.role == "replica", told
        assert second.begin_ns <= span.begin_ns < span.end_ns <= second.end_ns, told
    lines = [json.loads(line) for line in server.output.splitlines() if line.startswith("{")]
    (failover,) = [line for line in lines if line.get("trace_id") == trace_id and "continues on" in line["message"]]
    assert failover["span_id"] == root.span_id


@pytest.mark.chaos
@pytest.mark.timeout(3600)
def test_a_rank_killed_at_every_index_changes_no_byte(server, undisturbed):
    before = server.metric("num_failovers_total")
    for index in range(NUM_TOKENS):
        cut(server, undisturbed, index)
    assert server.metric("num_failovers_total") >= before + NUM_TOKENS / 2


@pytest.mark.timeout(300)
@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.chaos)])
def test_a_frozen_rank_is_named_within_5_seconds_and_its_streams_continue(server, undisturbed, rank):
    """On a busy machine within 10: this test's own polls and the server's clocks wait for a core too."""
    server.wait_ready(2)
    body, answer = undisturbed["seeded"]
    victim = next(iter(server.replicas("ready")))
    process = server.rank(victim, rank)
    process.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    clients = [Client(server, body, stream=True) for _ in range(6)]  # some of them start on the frozen replica
    server.wait_for(lambda: victim not in server.replicas("ready"), timeout_s=30, what="replace the frozen rank")
    seen_after = time.monotonic() - began
    for client in clients:
        client.join(100)
        assert client.error is None, client.error
        assert comparable(client.answer) == comparable(answer)
    said = server.output
    assert f"Replica {victim} " in said and f"rank {rank}" in said, f"the message does not name the rank:\n{said}"
    assert seen_after < 5.0 + 5.0 * is_busy(), f"it took {seen_after:.1f} s"
    server.wait_for(lambda: not process.is_running(), timeout_s=30, what="end the frozen process")


@pytest.mark.timeout(300)
def test_a_drained_replica_loses_no_stream(server, undisturbed):
    server.wait_ready(2)
    clients = [Client(server, undisturbed[name][0], stream=True) for name in REQUESTS for _ in range(2)]
    server.wait_for(lambda: clients[0].index > 3 or not clients[0].is_alive(), timeout_s=60, what="stream")
    victim = max(server.replicas("ready").values(), key=lambda r: r["load"]["num_running"])["replica_id"]
    status, _ = server.post(f"/admin/replicas/{victim}/drain", {"grace_s": 0})
    assert status == 202
    for i, client in enumerate(clients):
        client.join(100)
        assert client.error is None, client.error
        assert comparable(client.answer) == comparable(undisturbed[list(REQUESTS)[i // 2]][1])
    server.wait_for(lambda: server.replicas().get(victim, {}).get("state") != "ready", timeout_s=60, what="drain")
    server.wait_ready(2)


def test_nothing_is_left_after_the_last_request(server):
    server.wait_ready(2)
    gauges = ("num_requests_inflight", "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    server.wait_for(lambda: not any(map(server.metric, gauges)), timeout_s=60, what="become empty")
    assert server.health()[0] == 200


def test_the_server_stops_in_order(server):
    """Last in this file."""
    server.descendants = server.all_descendants()
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(60) == 0, server.output
    assert server.left_over() == []
