"""A short run of benchmarks/chaos.py: 32 clients on 3 replicas while ranks are killed or frozen and replicas drained."""

import asyncio
from collections.abc import Iterator

import pytest
from support.servers.system_server import API_KEY, Server

from benchmarks.chaos import report, run_chaos


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server("--replicas", "3", "--tensor-parallel-size", "2")
    try:
        yield server
    finally:
        server.kill()


@pytest.mark.chaos
@pytest.mark.timeout(400)
def test_chaos_fails_no_request_and_changes_no_byte(server):
    outcome = asyncio.run(
        run_chaos(
            server.url,
            seconds=15,
            num_clients=32,
            num_replicas=3,
            seed=3,
            headers={"Authorization": f"Bearer {API_KEY}"},
            pause_s=4.0,
        )
    )
    print("\n".join(report(outcome)))
    assert outcome.failures == []
    assert outcome.wrong == []
    assert sum(outcome.actions.values()) >= 3, outcome.actions
    assert outcome.num_done > 32
    assert outcome.num_failovers > 0, "no stream was interrupted, so this run shows nothing"
    assert not any(outcome.left_over.values()), outcome.left_over
