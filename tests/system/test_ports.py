"""Which ports a running server listens on: none that is not in this table, which is docs/security.md's, and none on another address."""

import urllib.error
import urllib.request
from collections import Counter

import pytest
from support.servers.ports import is_loopback, listening
from support.servers.system_server import Server

RAY_RPC = "Ray's RPC"
# By process, as docs/security.md has them: what it listens for, once each. `serve` here has one gateway and two ranks.
EXPECTED = {
    "tramontane": ("HTTP", RAY_RPC),
    "gcs_server": (RAY_RPC,),
    "raylet": (RAY_RPC, "Ray's objects"),
    "monitor.py": ("metrics",),
    "dashboard.py": ("dashboard", "metrics"),
    "ray::DashboardAgent": ("agent", RAY_RPC, "metrics"),
    "ray::RuntimeEnvAgent": ("agent",),
    "ray::ControllerActor": (RAY_RPC,),
    # Rank 0 of two: gateways' socket, lifeline. Rank 1 has Ray's RPC only.
    "ray::RankActor": (RAY_RPC, RAY_RPC, "gateways", "lifeline"),
}


def status(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as e:
        return e.code


def test_every_port_is_known_and_on_loopback(server: Server) -> None:
    found = listening(server)
    elsewhere = [f"{name} at {address}:{port}" for name, address, port in found if not is_loopback(address)]
    assert elsewhere == [], "others can reach these; a Ray of our own serves this machine only"
    unknown = Counter(name for name, _, _ in found) - Counter({name: len(ports) for name, ports in EXPECTED.items()})
    assert not unknown, (
        f"new listening sockets: {unknown}. Add them here and to docs/security.md, with what they demand."
    )
    assert {"tramontane", "gcs_server", "raylet", "ray::RankActor"} <= {name for name, _, _ in found}


@pytest.mark.parametrize(
    "path", ["/api/cluster_status", "/api/jobs/", "/api/v0/actors", "/nodes?view=summary", "/logs"]
)
def test_rays_dashboard_says_nothing_without_the_token(server: Server, path: str) -> None:
    ports = [port for name, _, port in listening(server) if name == "dashboard.py"]
    answers = {port: status(f"http://127.0.0.1:{port}{path}") for port in ports if port < 9000}
    assert list(answers.values()) == [401], answers


def test_rays_agents_say_nothing_without_the_token(server: Server) -> None:
    ports = [port for name, _, port in listening(server) if name == "ray::RuntimeEnvAgent"]
    assert [status(f"http://127.0.0.1:{port}/") for port in ports] == [401]
