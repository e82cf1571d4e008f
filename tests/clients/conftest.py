"""A target for invalid requests: the server without Ray, in a process whose log and memory are checked."""

import json
import time
from collections.abc import Iterator

import pytest
from support.clients.attacker import MIB, Attacker
from support.clients.fuzz_bodies import PLAIN
from support.servers.live_listener import FuzzTarget

# Memory that the allocator keeps after the largest bodies, in several threads. It is far below the gigabytes sent and does not grow.
MAX_GROWTH_BYTES = 400 * MIB


@pytest.fixture(scope="session")
def attacker() -> Iterator[Attacker]:
    with FuzzTarget() as target:
        attacker = Attacker(target)
        for path, body in PLAIN.items():  # so that the cost of starting up is not measured
            answer = attacker.post(path, json.dumps(body).encode())
            assert answer.status == (404 if "admin" in path else 200), answer
        before = target.rss_bytes
        yield attacker
        attacker.check_alive()
        deadline = time.monotonic() + 20
        while target.num_connections and time.monotonic() < deadline:
            time.sleep(0.1)
        assert target.num_connections == 0, "connections of disconnected clients must be closed"
        assert target.rss_bytes - before < MAX_GROWTH_BYTES, f"grew by {(target.rss_bytes - before) / MIB:.0f} MiB"
        for word in ("Traceback", " ERROR ", "never retrieved", "is lost"):
            assert word not in target.log, target.log[-10_000:]
