"""Which ports a running server listens on, and what each says without a token: docs/security.md's table, on loopback and nowhere else."""

import http.client
import socket
from collections import Counter

import grpc
import pytest
from support.servers.ports import is_loopback, listening
from support.servers.system_server import Server

RAY_RPC = "Ray's RPC: UNAUTHENTICATED"
AGENT, METRICS, CLOSES = "HTTP 401", "HTTP 200", "closes"
# By process, as docs/security.md has them: what each port answers, once each. `serve` here has one gateway and two ranks.
EXPECTED = {
    "tramontane": ("HTTP 401", RAY_RPC),
    "gcs_server": (RAY_RPC,),
    "raylet": (RAY_RPC, RAY_RPC),
    "monitor.py": (METRICS,),
    "dashboard.py": (AGENT, METRICS),
    "ray::DashboardAgent": (AGENT, RAY_RPC, METRICS),
    "ray::RuntimeEnvAgent": (AGENT,),
    "ray::ControllerActor": (RAY_RPC,),
    # Rank 0 of two: gateways' socket, lifeline. Rank 1 has Ray's RPC only.
    "ray::RankActor": (RAY_RPC, RAY_RPC, CLOSES, CLOSES),
}
# One method of each service that Ray's processes serve. gRPC says UNIMPLEMENTED to all others, before it looks for a token.
METHODS = (
    "NodeInfoGcsService/GetAllNodeInfo",
    "NodeManagerService/GetNodeStats",
    "ObjectManagerService/Pull",
    "CoreWorkerService/PushTask",
    "ReporterService/GetTraceback",
)


def answer(port: int) -> str:
    """What this port of loopback says to a stranger."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
        first = connection.recv(64)
    if first.startswith(b"HTTP/"):
        return f"HTTP {first.split()[1].decode()}"
    # gRPC begins with HTTP/2's SETTINGS frame, the type of which is the fourth byte.
    return f"Ray's RPC: {rpc_answer(port)}" if first[3:4] == b"\x04" else CLOSES


def rpc_answer(port: int) -> str:
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        codes = {code_of(channel, f"/ray.rpc.{method}") for method in METHODS}
    return "/".join(sorted(codes - {"UNIMPLEMENTED"}))


def code_of(channel: grpc.Channel, method: str) -> str:
    try:
        channel.unary_unary(method)(b"", timeout=30)
    except grpc.RpcError as e:
        return str(e.code().name)
    return "OK"


def status(url_port: int, path: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", url_port, timeout=30)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    finally:
        connection.close()


def test_every_port_is_known_and_on_loopback(server: Server) -> None:
    found = listening(server)
    elsewhere = [f"{name} at {address}:{port}" for name, address, port in found if not is_loopback(address)]
    assert elsewhere == [], "others can reach these; a Ray of our own serves this machine only"
    unknown = Counter((name, answer(port)) for name, _, port in found)
    unknown -= Counter((name, said) for name, ports in EXPECTED.items() for said in ports)
    assert not unknown, f"new listening sockets, or new answers: {unknown}. Add them here and to docs/security.md."
    assert {"tramontane", "gcs_server", "raylet", "ray::RankActor"} <= {name for name, _, _ in found}


@pytest.mark.parametrize(
    "path", ["/api/cluster_status", "/api/jobs/", "/api/v0/actors", "/nodes?view=summary", "/logs"]
)
def test_rays_dashboard_says_nothing_without_the_token(server: Server, path: str) -> None:
    ports = [port for name, _, port in listening(server) if name == "dashboard.py" and port < 9000]
    assert [status(port, path) for port in ports] == [401]
