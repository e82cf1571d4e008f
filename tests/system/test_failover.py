"""Real ranks are killed and frozen under running streams: clients get the same answers as without, and the gang is replaced.

`make test` cuts at two points, one for each rank, and freezes rank 0; `make test-chaos` cuts at all 64 and freezes both.
"""

import signal
import threading
import time
from collections.abc import Iterator

import pytest
from support.servers.system_server import Server

NUM_TOKENS = 64
REQUESTS = {
    "greedy": {"temperature": 0, "ignore_eos": True},
    "seeded": {"temperature": 1.0, "seed": 11, "ignore_eos": True, "frequency_penalty": 0.3},
    "logprobs": {"temperature": 1.0, "seed": 12, "ignore_eos": True, "logprobs": 3},
    "stop": {"temperature": 0.9, "seed": 13, "ignore_eos": True, "min_tokens": 4},  # gets a stop string below
}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server("--replicas", "2", "--tensor-parallel-size", "2", "--drain-timeout", "5")
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
    assert server.metric("num_failovers_total") > before, "no stream was interrupted, so this run shows nothing"
    assert server.metric("num_failovers_other_numerics_total") == 0, "replicas of one machine compute the same"


@pytest.mark.chaos
@pytest.mark.timeout(3600)
def test_a_rank_killed_at_every_index_changes_no_byte(server, undisturbed):
    before = server.metric("num_failovers_total")
    for index in range(NUM_TOKENS):
        cut(server, undisturbed, index)
    assert server.metric("num_failovers_total") >= before + NUM_TOKENS / 2


@pytest.mark.timeout(120)
@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.chaos)])
def test_a_frozen_rank_is_named_within_5_seconds_and_its_streams_continue(server, undisturbed, rank):
    server.wait_ready(2)
    body, answer = undisturbed["seeded"]
    victim = next(iter(server.replicas("ready")))
    process = server.rank(victim, rank)
    process.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    clients = [Client(server, body, stream=True) for _ in range(6)]  # some of them start on the frozen replica
    server.wait_for(lambda: victim not in server.replicas("ready"), timeout_s=15, what="replace the frozen rank")
    seen_after = time.monotonic() - began
    for client in clients:
        client.join(100)
        assert client.error is None, client.error
        assert comparable(client.answer) == comparable(answer)
    said = server.output
    assert f"Replica {victim} " in said and f"rank {rank}" in said, f"the message does not name the rank:\n{said}"
    assert seen_after < 5.0, f"it took {seen_after:.1f} s"
    server.wait_for(lambda: not process.is_running(), timeout_s=15, what="end the frozen process")


@pytest.mark.timeout(120)
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
    server.wait_for(lambda: server.replicas().get(victim, {}).get("state") != "ready", timeout_s=20, what="drain")
    server.wait_ready(2)


def test_nothing_is_left_after_the_last_request(server):
    server.wait_ready(2)
    gauges = ("num_requests_inflight", "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    server.wait_for(lambda: not any(map(server.metric, gauges)), timeout_s=10, what="become empty")
    assert server.health()[0] == 200


def test_the_server_stops_in_order(server):
    """Last in this file."""
    server.descendants = server.all_descendants()
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(60) == 0, server.output
    assert server.left_over() == []
