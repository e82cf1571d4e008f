"""One real server for every client, with the demo model and a key; what it says is nonsense, and these tests look at how it says it.
And one target for what no client would send: the same without Ray, in a process whose log and memory are watched.
"""

import json
import time
from collections.abc import Iterator

import pytest
from support.clients.attacker import MIB, Attacker
from support.clients.fuzz_bodies import PLAIN
from support.servers.live_listener import FuzzTarget
from support.servers.system_server import Server

# What the allocator keeps of the largest bodies, in several threads; far below the gigabytes sent, and it does not grow with them.
MAX_GROWTH_BYTES = 400 * MIB


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.kill()


@pytest.fixture(scope="session")
def attacker() -> Iterator[Attacker]:
    with FuzzTarget() as target:
        attacker = Attacker(target)
        for path, body in PLAIN.items():  # what start-up costs comes before what is measured
            answer = attacker.post(path, json.dumps(body).encode())
            assert answer.status == (404 if "admin" in path else 200), answer
        before = target.rss_bytes
        yield attacker
        attacker.check_alive()
        deadline = time.monotonic() + 20
        while target.num_connections and time.monotonic() < deadline:
            time.sleep(0.1)
        assert target.num_connections == 0, "connections whose clients are gone"
        assert target.rss_bytes - before < MAX_GROWTH_BYTES, f"grew by {(target.rss_bytes - before) / MIB:.0f} MiB"
        for word in ("Traceback", " ERROR ", "never retrieved", "is lost"):
            assert word not in target.log, target.log[-10_000:]
