"""The doctor across two hosts in network namespaces: healthy ones, a firewall between them, and a rank that is stopped."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.hosts.doctor_runs import messages, run_doctor
from support.hosts.ray_hosts import BIN, RayHosts, can_make_namespaces

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not can_make_namespaces(), reason="needs root, iproute2 and network namespaces"),
]
EPHEMERAL = "32768-60999"


class FixedPortHosts(RayHosts):
    """All of Ray's own ports are outside the kernel's ephemeral range, as where a security group lists the open ports."""

    def start(self, host: int, num_cpus: int, options=()) -> None:
        super().start(host, num_cpus, [*options, "--node-manager-port=7801", "--object-manager-port=7802"])


@pytest.fixture(scope="module")
def hosts() -> Iterator[RayHosts]:
    hosts = FixedPortHosts([2, 2], port=6379)
    try:
        yield hosts
    finally:
        hosts.close()


def rule(hosts: RayHosts, *words: str) -> None:
    subprocess.run([*hosts.prefix(0), "ip", "rule", *words], check=True, capture_output=True)


@pytest.fixture
def firewall(hosts) -> Iterator[None]:
    """Host 0 drops packets between two ephemeral ports; Ray itself keeps working."""
    rule(hosts, "add", "pref", "100", "lookup", "local")
    rule(hosts, "del", "pref", "0")  # comes before every other rule
    dropped = ("iif", "eth0", "ipproto", "tcp", "sport", EPHEMERAL, "dport", EPHEMERAL, "blackhole")
    rule(hosts, "add", "pref", "50", *dropped)
    try:
        yield
    finally:
        rule(hosts, "del", "pref", "50")
        rule(hosts, "add", "pref", "0", "lookup", "local")
        rule(hosts, "del", "pref", "100")


def test_two_healthy_hosts(hosts):
    status, report = run_doctor(hosts)
    assert status == 0, report
    found = report["all_reduce"]
    assert (found["outcome"], found["collectives"], found["interface"]) == ("measured", "Gloo", "eth0")
    assert sorted(found["ranks"]) == hosts.ips
    assert found["bus_bytes_per_s"] > 1e6
    assert messages(report, "ports", "ok") == ["All 2 nodes can reach each other on ports the kernel chose."]
    assert "the same on 2 nodes" in messages(report, "model", "ok")[0]
    for ip in hosts.ips:
        assert any(f"through eth0 ({ip})" in s for s in messages(report, "interface", "ok"))


def test_ranks_are_placed_where_serve_would_place_them(hosts):
    _, report = run_doctor(hosts, "--tensor-parallel-size", "2", host=1)
    found = report["all_reduce"]
    assert found["collectives"] == "shared memory" and len(set(found["ranks"])) == 1
    _, report = run_doctor(hosts, "--tensor-parallel-size", "4")
    found = report["all_reduce"]
    assert found["collectives"] == "Gloo" and sorted(found["ranks"]) == sorted(hosts.ips * 2)


def test_a_closed_port_names_the_pair_and_the_ranks(hosts, firewall):
    began = time.monotonic()
    status, report = run_doctor(hosts)
    assert time.monotonic() - began < 60
    assert status == 1
    a, b = hosts.ips
    closed = messages(report, "ports", "problem")
    assert any(s.startswith(f"{b} cannot reach {a} ") for s in closed), closed
    remedies = [f["remedy"] for f in report["findings"] if f["check"] == "ports"]
    assert all("TCP 32768 to 60999" in r for r in remedies)
    (message,) = messages(report, "all-reduce", "problem")
    assert "Rank 1" in message and "rank 0 (" in message


def test_a_stopped_rank_is_named(hosts):
    """The second rank to appear is stopped before it joins."""
    stopped: list[int] = []
    over = threading.Event()

    def stop_one() -> None:
        while not over.is_set():
            ranks = [pid for pid in hosts.processes() if b"ProbeRank" in _title(pid)]
            if len(ranks) == 2:
                os.kill(ranks[-1], signal.SIGSTOP)
                stopped.append(ranks[-1])
                return
            time.sleep(0.005)

    stopping = threading.Thread(target=stop_one)
    stopping.start()
    try:
        status, report = run_doctor(hosts, "--timeout", "5")
    finally:
        over.set()
        stopping.join()
    assert stopped and status == 1
    (message,) = messages(report, "all-reduce", "problem")
    assert "does not answer at all" in message, message
    assert messages(report, "ports", "ok")


def test_full_shared_memory():
    """On one host, in a mount namespace of its own: the facts and the trial agree."""
    mount = "mount -t tmpfs -o size=3m tmpfs /dev/shm"
    command = f"{mount} && exec {BIN / 'tramontane'} doctor --port 7999"
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", command], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 1, done.stderr
    said = " ".join(done.stdout.split())
    assert "shared memory problem 3.0 MiB of 3.0 MiB are free in /dev/shm; 2 ranks need 4.0 MiB." in said
    assert "all-reduce problem" in said and "No space left on device" in said.replace("[Errno 28] ", "")


def _title(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0]
    except OSError:
        return b""
