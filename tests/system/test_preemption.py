"""A preemption notice arrives: on one of two hosts, each with a cloud's metadata service at its real address, and on a server alone.

Part of `make test-chaos`. `make test` runs the same without Ray: tests/cluster/controller/preemption/test_act.py.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence

import pytest
from support.hosts.ray_hosts import RayHosts, can_make_namespaces
from support.hosts.remote_server import Reader, RemoteServer, nodes_of, text_of
from support.paths import ROOT
from support.servers.system_server import Server

pytestmark = pytest.mark.chaos
needs_namespaces = pytest.mark.skipif(not can_make_namespaces(), reason="needs root, iproute2 and network namespaces")
BODY = {
    "model": "demo_model",
    "prompt": "class Reader:\n",
    "max_tokens": 200,
    "seed": 5,
    "ignore_eos": True,
    "stream": True,
}
METADATA_IP = "169.254.169.254"
GRACE_S = {"aws": 120, "gcp": 30, "azure": 30}
FAKE = ROOT / "tests" / "support" / "fakes" / "metadata.py"


@contextlib.contextmanager
def metadata_service(cloud: str, host: str, port: int, *, prefix: Sequence[str] = ()) -> Iterator[str]:
    """Its URL."""
    command = [*prefix, sys.executable, str(FAKE), cloud, host, str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        url = process.stdout.readline().strip()
        assert url.startswith("http://")
        yield url
    finally:
        process.kill()
        process.communicate()


@contextlib.contextmanager
def metadata_services(hosts: RayHosts, cloud: str) -> Iterator[None]:
    """One per host; each host reaches only its own."""
    with contextlib.ExitStack() as stack:
        for host, namespace in enumerate(hosts.namespaces):
            subprocess.run(["ip", "-n", namespace, "addr", "add", f"{METADATA_IP}/32", "dev", "lo"], check=True)
            stack.enter_context(metadata_service(cloud, METADATA_IP, 80, prefix=hosts.prefix(host)))
        yield


def announce(url: str, grace_s: float, *, prefix: Sequence[str] = ()) -> None:
    body = json.dumps({"grace_s": grace_s})
    subprocess.run([*prefix, "curl", "-sSf", "-X", "POST", f"{url}/fake/announce", "-d", body], check=True)


def notices(server: Server) -> list[dict]:
    return json.loads(server.get("/admin/cluster")[1])["notices"]


HOLD = """
import sys, ray
ray.init(sys.argv[1], log_to_driver=False, logging_level="ERROR")
group = ray.util.placement_group([{"CPU": 1, f"node:{sys.argv[2]}": 0.001}])
print(group.wait(60), flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def held_cpu(hosts: RayHosts) -> Iterator[None]:
    """Occupies a CPU of the first host, so that one replica must be placed on the second."""
    command = [*hosts.prefix(0), sys.executable, "-c", HOLD, hosts.address, hosts.ips[0]]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=hosts.env)
    try:
        assert process.stdout.readline() == "True\n"
        yield
    finally:
        process.communicate("", timeout=60)


def leave(cloud: str, *, has_spare: bool) -> None:
    """Four clients use two replicas, one of them on the preempted host. has_spare: there is room for its replacement."""
    hosts = RayHosts([2 if has_spare else 1, 1])
    try:
        with metadata_services(hosts, cloud), contextlib.ExitStack() as stack:
            with held_cpu(hosts) if has_spare else contextlib.nullcontext():
                server = RemoteServer(hosts, "--replicas", "2", "--preemption-notices", cloud)
                stack.callback(server.kill)
                server.wait_ready(2)
            check_leaving(hosts, server, cloud, has_spare=has_spare)
    finally:
        hosts.close()


def check_leaving(hosts: RayHosts, server: RemoteServer, cloud: str, *, has_spare: bool) -> None:
    far = next(i for i, r in server.replicas().items() if hosts.ips[1] in nodes_of(r))
    expected = text_of(server.curl("/v1/completions", BODY))
    clients = [Streams(server) for _ in range(4)]
    server.wait_for(lambda: all(c.is_streaming for c in clients), timeout_s=60, what="stream")
    server.wait_for(
        lambda: server.replicas()[far]["load"]["num_running"] > 0, timeout_s=60, what="stream on the preempted node"
    )
    others = ShortRequests(server)
    announced = time.time()
    announce(f"http://{METADATA_IP}", GRACE_S[cloud], prefix=hosts.prefix(1))
    server.wait_for(lambda: bool(notices(server)), timeout_s=20, what="see the notice")
    server.wait_for(
        lambda: notices(server)[0]["drained_at"] is not None, timeout_s=GRACE_S[cloud], what="drain the node"
    )
    (notice,) = notices(server)
    texts = [text for client in clients for text in client.stop()]
    statuses = others.stop()
    heard, drained = notice["seen_at"] - announced, notice["drained_at"] - announced
    pause = max(client.longest_pause for client in clients)
    print(f"{cloud}: heard of after {heard:.1f} s, drained after {drained:.1f} s; ", end="")
    print(f"{len(texts)} streams, longest pause {pause:.1f} s; {len(statuses)} short requests")
    assert texts == [expected] * len(texts)
    assert statuses and set(statuses) == {200}, "requests failed during the drain"
    assert drained < GRACE_S[cloud]
    assert server.metric("num_failovers_total") > 0
    assert server.metric("preemption_notices_total") == 1
    assert "will be removed in" in server.output and "was drained" in server.output
    assert server.get("/health/ready")[0] == 200, "the gateway is on the other node"
    if has_spare:
        server.wait_ready(2)
        assert all(hosts.ips[1] not in nodes_of(r) for r in server.replicas("ready").values())


class Streams(threading.Thread):
    """Runs one stream after another until `stop`, which returns their texts."""

    def __init__(self, server: RemoteServer) -> None:
        super().__init__(daemon=True)
        self.longest_pause = 0.0
        self._server = server
        self._over = threading.Event()
        self._texts: list[str | None] = []
        self._reader: Reader | None = None
        self.start()

    @property
    def is_streaming(self) -> bool:
        return self._reader is not None and self._reader.num_events > 0

    def run(self) -> None:
        while not self._over.is_set():
            reader = self._reader = Reader(self._server.curl("/v1/completions", BODY))
            reader.join(200)
            self._texts.append(reader.text)
            self.longest_pause = max(self.longest_pause, reader.longest_pause)

    def stop(self) -> list[str | None]:
        self._over.set()
        self.join(250)
        return self._texts


class ShortRequests(threading.Thread):
    """Runs one short request after another until `stop`, which returns their statuses."""

    def __init__(self, server: RemoteServer) -> None:
        super().__init__(daemon=True)
        self._server = server
        self._over = threading.Event()
        self._statuses: list[int] = []
        self.start()

    def run(self) -> None:
        body = {"model": "demo_model", "prompt": "def f(", "max_tokens": 4}
        while not self._over.is_set():
            out, _ = self._server.curl("/v1/completions", body, "-w", "\n%{http_code}").communicate()
            self._statuses.append(int(out.rpartition("\n")[2]))

    def stop(self) -> list[int]:
        self._over.set()
        self.join(100)
        return self._statuses


@needs_namespaces
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("cloud", "has_spare"),
    [("aws", True), ("gcp", True), ("azure", True), pytest.param("gcp", False, id="without room for a successor")],
)
def test_a_node_with_a_notice_is_drained_in_time_and_no_request_fails(cloud, has_spare):
    leave(cloud, has_spare=has_spare)


@pytest.mark.timeout(300)
def test_a_single_server_announces_its_preemption_and_ends_remaining_streams_with_an_error_event():
    with metadata_service("gcp", "127.0.0.1", 0) as url:
        env = {**os.environ, "TRAMONTANE_METADATA_URL": url, "HTTP_PROXY": "http://127.0.0.1:1"}
        server = Server("--preemption-notices", "gcp", env=env)
        try:
            clients = [Client(server) for _ in range(12)]
            server.wait_for(lambda: all(c.num_events for c in clients), timeout_s=60, what="stream")
            announced = time.monotonic()
            announce(url, 30)
            server.wait_for(lambda: server.health()[0] == 503, timeout_s=10, what="announce its preemption")
            heard_s = time.monotonic() - announced
            assert "This server shuts down at" in server.health()[1]["reason"]
            assert server.complete(prompt="class B:\n", max_tokens=4)["choices"][0]["text"], (
                "it still serves new requests"
            )
            assert server.replicas("ready"), "there is no other replica to move to"
            for client in clients:
                client.join(60)
            refused = [c.refused_at - announced for c in clients if c.refused_at is not None]
            ended = [c.ended_at - announced for c in clients if c.ended_at is not None]
            print(
                f"heard of after {heard_s:.1f} s; {len(refused)} refused from {min(refused, default=0):.1f} s on, ",
                end="",
            )
            print(
                f"{len(ended)} of {sum(c.num_complete for c in clients)} streams ended at {max(ended, default=0):.1f} s"
            )
            assert [c.error for c in clients if c.error] == []
            assert len(refused) + len(ended) == len(clients)
            assert all(10 < s < 30 for s in refused), "refused too early, or after the machine was gone"
            assert ended and all(25 < s < 30 for s in ended), "ended too early, or after the machine was gone"
        finally:
            server.kill()


class Client(threading.Thread):
    """Runs one long stream after another, until one is refused or ends with a reason. Times are time.monotonic()."""

    def __init__(self, server: Server) -> None:
        super().__init__(daemon=True)
        self._server = server
        self.num_events = self.num_complete = 0
        self.refused_at: float | None = None
        self.ended_at: float | None = None
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            while self.ended_at is None and self.refused_at is None:
                self._stream()
        except Exception as e:  # the test reports it
            self.error = e

    def _stream(self) -> None:
        body = {"prompt": "class A:\n", "max_tokens": 1900, "stream": True, "ignore_eos": True}
        try:
            response = urllib.request.urlopen(self._server.request(body), timeout=100)
        except urllib.error.HTTPError as e:
            assert (e.code, e.headers["Retry-After"] is not None) == (503, True), e.read()
            self.refused_at = time.monotonic()
            return
        with response:
            last = b""
            for line in response:
                if line.startswith(b"data: "):
                    self.num_events, last = self.num_events + 1, line
        if last.strip() == b"data: [DONE]":
            self.num_complete += 1
            return
        assert json.loads(last[6:])["error"]["code"] == "server_leaving", last
        self.ended_at = time.monotonic()
