"""On a Ray cluster that an operator started: replicas outlive `serve`, several gateways serve them, and `down` removes everything."""

import contextlib
import http.client
import itertools
import json
import re
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import psutil
import pytest
from support.hosts.doctor_runs import messages, run_doctor
from support.hosts.ray_hosts import BIN, RayHosts
from support.servers.postgres import new_database, postgres_server
from support.servers.system_server import API_KEY, Server

from workers.device.probe import NoGpu, probe

RESPONSE = {"input": "def fibonacci(n):", "seed": 7, "ignore_eos": True, "max_output_tokens": 250}
PROMPT = {"prompt": "def fibonacci(n):", "max_tokens": 8, "temperature": 0}


@pytest.fixture(scope="module")
def hosts() -> Iterator[RayHosts]:
    hosts = RayHosts([4])
    try:
        yield hosts
    finally:
        hosts.close()


@pytest.fixture(scope="module")
def database() -> Iterator[str | None]:
    """Of a PostgreSQL server, which gateways on several hosts need; None where none is installed."""
    with contextlib.ExitStack() as stack:
        folder = None
        with contextlib.suppress(pytest.skip.Exception):
            folder = stack.enter_context(postgres_server())
        yield None if folder is None else new_database(folder)


@pytest.fixture(scope="module")
def two_gateways(hosts, database) -> Iterator[Server]:
    """A command with two gateways, on PostgreSQL where there is one."""
    store = [] if database is None else ["--batch-store", database]
    server = serve(hosts, "--replicas", "2", "--tensor-parallel-size", "2", "--gateways", "2", *store)
    yield server
    server.kill()


def serve(hosts: RayHosts, *options: str) -> Server:
    return Server("--ray-address", hosts.address, *options, env=hosts.env)


def rank_pids(server: Server) -> list[int]:
    return sorted(rank["pid"] for r in server.replicas("ready").values() for rank in r["ranks"])


@pytest.mark.timeout(300)
def test_doctor_starts_real_ranks_where_nothing_runs_yet(hosts):
    """First in this file."""
    status, report = run_doctor(hosts, "--tensor-parallel-size", "2")
    assert status == 0, report
    assert report["all_reduce"]["outcome"] == "measured"
    assert len(report["all_reduce"]["ranks"]) == 2 and report["all_reduce"]["collectives"] == "shared memory"
    assert 0 < report["all_reduce"]["latency_s"] < 1


@pytest.mark.timeout(300)
def test_a_killed_server_finds_its_replicas_again(hosts):
    first = serve(hosts, "--replicas", "2", "--tensor-parallel-size", "2")
    try:
        first.wait_ready(2)
        text = first.complete(**PROMPT)["choices"][0]["text"]
        pids = rank_pids(first)
        whole = response_texts(stream_response(first.url, RESPONSE | {"store": False}))
        began_response = list(itertools.islice(stream_response(first.url, RESPONSE), 30))
        first.process.send_signal(signal.SIGKILL)
        first.process.wait()
    finally:
        first.kill()
    assert all(psutil.pid_exists(pid) for pid in pids), "the ranks ended with the serving process"
    began = time.monotonic()
    second = serve(hosts, "--replicas", "2", "--tensor-parallel-size", "2")
    try:
        assert second.complete(**PROMPT)["choices"][0]["text"] == text
        took = time.monotonic() - began
        assert rank_pids(second) == pids, "weights were loaded again"
        assert "Loading the weights" not in second.output
        check_resumed(second.url, began_response, whole)
        print(f"first answer {took:.1f} s after the restart")
        second.process.send_signal(signal.SIGTERM)
        assert second.process.wait(60) == 0
        assert "tramontane down" in second.output, "the output does not say how to end the replicas"
    finally:
        second.kill()
    assert all(psutil.pid_exists(pid) for pid in pids), "a gateway that stopped in order ended the replicas"


@pytest.mark.timeout(300)
def test_doctor_takes_nothing_from_replicas_that_use_everything(hosts):
    status, report = run_doctor(hosts)
    assert status == 0, report
    assert report["all_reduce"]["outcome"] == "not tried"
    running = report["all_reduce"]["running"]
    assert [(r["replica_id"], len(r["ranks"])) for r in running] == [("r0", 2), ("r1", 2)]
    assert all(r["num_all_reduces"] > 0 and 0 < r["mean_s"] < 1 for r in running)
    assert "Not tried, because running replicas use the resources." in messages(report, "all-reduce", "ok")[0]


@pytest.mark.timeout(300)
def test_another_model_under_the_same_name_is_refused(hosts):
    command = [str(BIN / "tramontane"), "serve", "--port", "0", "--ray-address", hosts.address, "--block-size", "32"]
    done = subprocess.run(command, env=hosts.env, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 2, done.stderr
    assert "tramontane down" in done.stderr and "--name" in done.stderr


@pytest.mark.timeout(300)
def test_several_gateways_serve_the_same_replicas(two_gateways):
    server = two_gateways
    urls = [line.split()[-1].removesuffix("/v1") for line in server.output.splitlines() if line.endswith("/v1")]
    assert len(urls) == len(set(urls)) == 2, server.output
    texts = set()
    for url in urls:
        request = urllib.request.Request(
            f"{url}/v1/completions",
            data=json.dumps({"model": "demo_model", **PROMPT}).encode(),
            headers={"Authorization": f"Bearer {API_KEY}", "Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as response:
            texts.add(json.load(response)["choices"][0]["text"])
    assert len(texts) == 1
    server.wait_for(
        lambda: len(json.loads(server.get("/admin/cluster")[1])["gateways"]) == 2,
        timeout_s=30,
        what="see both gateways",
    )


@pytest.mark.timeout(300)
def test_a_killed_controller_is_restarted_and_adopts_the_running_replicas(hosts, two_gateways):
    server = two_gateways
    pids = rank_pids(server)
    view = json.loads(server.get("/admin/cluster")[1])
    controllers = hosts.named("ControllerActor")
    assert len(controllers) == 1
    controllers[0].kill()
    server.wait_for(
        lambda: json.loads(server.get("/admin/cluster")[1]).get("controller_id") not in (None, view["controller_id"]),
        timeout_s=60,
        what="connect to the new controller",
    )
    server.wait_ready(2)
    assert rank_pids(server) == pids, "the new controller replaced replicas instead of adopting them"
    assert server.complete(**PROMPT)["choices"][0]["text"]


@pytest.mark.timeout(300)
def test_a_response_outlives_its_replica_and_its_gateway(hosts, two_gateways, database):
    """Both are killed while it is generated; its client goes on at the other gateway, which reads what the first one stored."""
    server = two_gateways
    urls = [line.split()[-1].removesuffix("/v1") for line in server.output.splitlines() if line.endswith("/v1")]
    [other] = [url for url in urls if url != server.url]
    body = RESPONSE | {"max_output_tokens": 1000}
    whole = response_texts(stream_response(server.url, body | {"store": False}))
    stream = stream_response(other, body)
    seen = list(itertools.islice(stream, 20))
    busy: list[str | None] = [None]
    server.wait_for(
        lambda: busy.append(busy_replica(server)) or busy[-1] is not None, timeout_s=30, what="show where it runs"
    )
    server.rank(busy[-1], 1).kill()
    seen += itertools.islice(stream, 20)
    gateways = hosts.named("GatewayActor")
    assert len(gateways) == 1
    gateways[0].kill()
    with contextlib.suppress(OSError, http.client.HTTPException):
        seen += stream  # what had been sent
    assert seen[-1]["type"] == "response.output_text.delta", "it had ended before its gateway was killed"
    response_id = seen[0]["response"]["id"]
    check_resumed(server.url, seen, whole)
    # By the gateway that is left, or by the killed one's successor, which may not listen yet.
    server.wait_for(lambda: sum(taken_over(server, url) for url in urls) == 1, timeout_s=60, what="count one takeover")
    if database is not None:
        psycopg = pytest.importorskip("psycopg")
        with psycopg.connect(database) as connection:
            found = connection.execute("SELECT status, lease_fence FROM responses WHERE id = %s", (response_id,))
            assert found.fetchall() == [("incomplete", 2)], "the second runner ended it, in PostgreSQL"
    server.wait_ready(2)


def taken_over(server: Server, url: str) -> float:
    """How many stored responses the gateway at `url` took over: none where nothing listens yet."""
    try:
        return server.metric("stored_responses_taken_over_total", url=url)
    except (OSError, http.client.HTTPException):
        return 0.0


def busy_replica(server: Server) -> str | None:
    """The replica that generates something."""
    return next((name for name, r in server.replicas("ready").items() if r["load"]["num_running"]), None)


def check_resumed(url: str, seen: list[dict], whole: list[str]) -> None:
    """The rest of a stream that broke: nothing is missing, nothing comes twice, and every piece of text is as without a failure."""
    response_id = seen[0]["response"]["id"]
    rest = list(stream_response(url, None, f"/{response_id}?stream=true&starting_after={seen[-1]['sequence_number']}"))
    assert [event["sequence_number"] for event in seen + rest] == list(range(len(seen + rest)))
    assert rest[-1]["response"]["status"] == "incomplete", "it ends at its limit of tokens"
    assert response_texts(seen + rest) == whole
    assert list(stream_response(url, None, f"/{response_id}?stream=true")) == seen + rest


def response_texts(events: Iterable[dict]) -> list[str]:
    return [event["delta"] for event in events if event["type"] == "response.output_text.delta"]


def stream_response(url: str, body: dict | None, path: str = "") -> Iterator[dict]:
    """The events of a new response, or of the one at the path."""
    request = urllib.request.Request(
        f"{url}/v1/responses{path}",
        data=None if body is None else json.dumps({"model": "demo_model", "stream": True, **body}).encode(),
        headers={"Authorization": f"Bearer {API_KEY}", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        for line in response:
            if line.startswith(b"data: "):
                yield json.loads(line.removeprefix(b"data: "))


@pytest.mark.chaos  # a node that joins takes ten seconds or more
@pytest.mark.timeout(300)
@pytest.mark.skipif(not isinstance(probe(), NoGpu), reason="this machine has a GPU")
def test_a_rank_waits_for_a_gpu_and_never_computes_on_the_cpu_in_its_place(hosts, tmp_path):
    """The node that joins later only claims to have one."""
    command = [str(BIN / "tramontane"), "serve", "--port", "0", "--name", "gpus", "--ray-address", hosts.address]
    log = tmp_path / "log"
    with log.open("w") as f:
        server = subprocess.Popen([*command, "--device", "cuda"], env=hosts.env, stdout=f, stderr=f)
    try:
        wait_for(lambda: "Needed: one rank with 1 CPU and 1 GPU." in log.read_text(), server)
        hosts.add_node(1, num_gpus=1)
        assert server.wait(60) == 2, log.read_text()
    finally:
        server.kill()
        server.wait()
    last = log.read_text().splitlines()[-1]
    assert re.match(r"tramontane: Rank 0 on \S+, where Ray counts 1 GPU, cannot use a GPU: this machine has ", last), (
        last
    )


def wait_for(condition: Callable[[], bool], server: subprocess.Popen, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert server.poll() is None and time.monotonic() < deadline, "what was awaited did not come"
        time.sleep(0.05)


@pytest.mark.timeout(300)
def test_down_removes_everything(hosts, two_gateways):
    """Last in this file."""
    two_gateways.kill()
    command = [str(BIN / "tramontane"), "down", "--ray-address", hosts.address]
    done = subprocess.run(command, env=hosts.env, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert "is down" in done.stdout
    deadline = time.monotonic() + 60
    while (left := ours(hosts)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == []
    # The ranks of another test's server have a file here while they join.
    while (files := list(Path("/dev/shm").glob("tramontane-*"))) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert files == []
    again = subprocess.run(command, env=hosts.env, capture_output=True, text=True, timeout=100, check=False)
    assert "Nothing of 'tramontane' runs" in again.stdout


def ours(hosts: RayHosts) -> list[psutil.Process]:
    return [p for word in ("RankActor", "ControllerActor", "GatewayActor") for p in hosts.named(word)]
