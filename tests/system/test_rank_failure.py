"""A rank that hangs, comes back, and dies: readiness tells the truth and streams end. Has a server to itself, and ruins it."""

import json
import signal
import time
import urllib.error
import urllib.request

import pytest
from system_server import API_KEY


def open_stream(server, max_tokens: int):
    body = {"model": "demo_model", "prompt": "x = ", "max_tokens": max_tokens, "stream": True, "ignore_eos": True}
    request = urllib.request.Request(
        f"{server.url}/v1/completions",
        data=json.dumps(body).encode(),
        headers={"Authorization": f"Bearer {API_KEY}", "Content-Type": "application/json"},
    )
    return urllib.request.urlopen(request, timeout=60)


def events(response) -> list:
    lines = (line.decode().strip() for line in response)
    return [line[6:] for line in lines if line.startswith("data: ")]


def reason_when_unhealthy(server, timeout_s: float) -> str:
    server.wait_for(lambda: server.health()[0] == 503, timeout_s=timeout_s, what="call itself unavailable")
    return server.health()[1]["reason"]


def test_a_stopped_rank_is_named_and_a_running_one_again_is_well(server):
    server.ranks[1].send_signal(signal.SIGSTOP)
    began = time.monotonic()
    try:
        reason = reason_when_unhealthy(server, timeout_s=10)
        server.wait_for(lambda: "rank 1" in (server.health()[1]["reason"] or ""), timeout_s=10, what="name rank 1")
        assert "r0" in reason
        assert time.monotonic() - began < 10
    finally:
        server.ranks[1].send_signal(signal.SIGCONT)
    server.wait_for(lambda: server.health()[0] == 200, timeout_s=10, what="recover")
    with open_stream(server, 4) as response:
        assert events(response)[-1] == "[DONE]"


def test_a_killed_rank_ends_streams_with_an_error_and_is_named(server):
    with open_stream(server, 3000) as response:
        response.readline()
        server.ranks[1].kill()
        rest = events(response)
    assert any("error" in json.loads(e) for e in rest if e != "[DONE]"), "the stream ended as if nothing had happened"
    assert reason_when_unhealthy(server, timeout_s=10) == "Replica r0 lost rank 1: its process died."
    with pytest.raises(urllib.error.HTTPError) as refused:
        open_stream(server, 1)
    assert refused.value.code == 503
    assert json.load(refused.value)["error"]["message"]
    assert server.process.poll() is None, "the gateway itself goes on"


def test_the_gateway_still_stops_in_order(server):
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(40) == 0, server.output
    assert server.left_over() == []
