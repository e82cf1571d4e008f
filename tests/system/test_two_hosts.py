"""Two hosts, as network namespaces with a veth pair and Ray with its token between them; then the cable is pulled.

Part of `make test-chaos`. `make test` shows the parts on one host: test_failover.py freezes ranks,
tests/cluster/replicas/test_client.py lets a connection fall silent, and tests/workers/parallel/test_distributed.py runs ranks over Gloo.
"""

import contextlib
import time
from collections.abc import Iterator

import pytest
from support.checkpoints.adapters import write_adapter
from support.hosts.ray_hosts import RayHosts, can_make_namespaces
from support.hosts.remote_server import Reader, RemoteServer, nodes_of, text_of
from support.paths import DEMO_MODEL

from workers.checkpoint.model_config import load_model_config

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.skipif(not can_make_namespaces(), reason="needs root, iproute2 and network namespaces"),
]
BODY = {"model": "demo_model", "prompt": "class Reader:\n", "max_tokens": 500, "seed": 5, "ignore_eos": True}


@contextlib.contextmanager
def cluster(cpus: list[int], *options: str) -> Iterator[tuple[RayHosts, RemoteServer]]:
    hosts = RayHosts(cpus)
    try:
        server = RemoteServer(hosts, *options)
        try:
            yield hosts, server
        finally:
            server.kill()
    finally:
        hosts.close()


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("cpus", "options"),
    [
        pytest.param([1, 1], ["--replicas", "2"], id="a replica on each host"),
        pytest.param([3, 1], ["--replicas", "2", "--tensor-parallel-size", "2"], id="one replica across both hosts"),
    ],
)
def test_streams_survive_a_pulled_cable(cpus, options):
    with cluster(cpus, *options) as (hosts, server):
        server.wait_ready(2)
        near, far = (
            next(i for i, r in server.replicas().items() if (hosts.ips[1] in nodes_of(r)) is elsewhere)
            for elsewhere in (False, True)
        )
        expected = text_of(server.curl("/v1/completions", {**BODY, "stream": True}))
        readers = [Reader(server.curl("/v1/completions", {**BODY, "stream": True})) for _ in range(4)]
        server.wait_for(lambda: all(r.num_events for r in readers), timeout_s=60, what="stream")
        running = {i: r["load"]["num_running"] for i, r in server.replicas().items()}
        hosts.cut()
        began = time.monotonic()
        server.wait_for(lambda: far not in server.replicas("ready"), timeout_s=20, what="miss the other host")
        detected = time.monotonic() - began
        for reader in readers:
            reader.join(100)
        resumed = max(reader.longest_pause for reader in readers)
        print(f"{running} running; detected after {detected:.1f} s; longest pause of a stream {resumed:.1f} s")
        assert [reader.text for reader in readers] == [expected] * len(readers)
        assert server.metric("num_failovers_total") > 0, "no stream ran on the host that was cut off"
        assert detected < 10 and resumed < 10
        assert f"Replica {far} " in server.output, "the message does not name the replica"
        assert near in server.replicas("ready")


@pytest.mark.timeout(300)
def test_an_adapter_reaches_the_ranks_of_the_other_host(tmp_path):
    """Through Ray: they cannot be expected to read the head's folder."""
    source = write_adapter(tmp_path / "support", load_model_config(DEMO_MODEL), strength=0.05)
    with cluster([1, 1], "--replicas", "2", "--enable-lora", "--data-dir", str(tmp_path / "data")) as (hosts, server):
        server.wait_ready(2)
        assert {nodes_of(r)[0] for r in server.replicas().values()} == set(hosts.ips)
        body = {"lora_name": "support", "lora_path": str(source)}
        assert "added successfully" in server.curl("/v1/load_lora_adapter", body).communicate(timeout=60)[0]
        held = [tuple(r["adapters"]) for r in server.replicas("ready").values()]
        assert len(held) == 2 and len(set(held)) == 1 and held[0][0].startswith("support@"), held
        texts = {
            text_of(server.curl("/v1/completions", {**BODY, "model": "support", "stream": True})) for _ in range(4)
        }
        assert len(texts) == 1
