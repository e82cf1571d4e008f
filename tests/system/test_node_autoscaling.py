"""Ray's node autoscaler with ours, without a cloud: pending placement groups add nodes, and released ones remove them.

Ray's fake multi-node provider starts each node as processes on this machine.
"""

import json
import threading
import time
from collections.abc import Iterator

import pytest
from support.hosts.ray_hosts import RayHosts
from support.hosts.scaling_hosts import num_raylets, scaling_hosts
from support.servers.system_server import Server


@pytest.fixture
def hosts(tmp_path) -> Iterator[RayHosts]:
    hosts = scaling_hosts(tmp_path)
    try:
        yield hosts
    finally:
        hosts.close()


@pytest.mark.chaos  # waits about a minute for nodes
@pytest.mark.timeout(400)
def test_nodes_are_added_and_removed_with_the_load(hosts):
    began = time.monotonic()
    server = Server(
        "--ray-address",
        hosts.address,
        "--replicas",
        "0:2",
        "--max-num-seqs",
        "2",
        "--scale-down-after",
        "12",
        env=hosts.env,
    )
    try:
        figures = {"first replica on a new node": time.monotonic() - began}
        assert "Needed: one rank with 1 CPU." in server.output, "the client was not told what it waits for"
        assert num_raylets(hosts) == 2
        expected = server.complete(prompt="class A:\n", max_tokens=150, seed=1, ignore_eos=True)["choices"][0]["text"]

        began = time.monotonic()
        over, texts = threading.Event(), []

        def load() -> None:
            while not over.is_set():
                body = {"prompt": "class A:\n", "max_tokens": 150, "seed": 1, "ignore_eos": True}
                texts.append(server.complete(**body)["choices"][0]["text"])

        threads = [threading.Thread(target=load, daemon=True) for _ in range(6)]
        for thread in threads:
            thread.start()
        server.wait_for(lambda: len(server.replicas("ready")) == 2, timeout_s=120, what="scale up to two replicas")
        figures["second replica on another new node"] = time.monotonic() - began
        assert num_raylets(hosts) == 3
        over.set()
        for thread in threads:
            thread.join(100)
        assert texts and set(texts) == {expected}

        began = time.monotonic()
        server.wait_for(lambda: not server.replicas(), timeout_s=120, what="scale down to none")
        figures["no replica left"] = time.monotonic() - began
        server.wait_for(lambda: num_raylets(hosts) == 1, timeout_s=120, what="give its nodes back")
        figures["no node left"] = time.monotonic() - began
        status, health = server.health()
        assert status == 200, f"zero replicas at rest are healthy: {health}"

        began = time.monotonic()
        again = server.complete(prompt="class A:\n", max_tokens=150, seed=1, ignore_eos=True)
        figures["a request wakes a replica"] = time.monotonic() - began
        assert again["choices"][0]["text"] == expected
        print(json.dumps({name: f"{seconds:.1f} s" for name, seconds in figures.items()}))
    finally:
        server.kill()
