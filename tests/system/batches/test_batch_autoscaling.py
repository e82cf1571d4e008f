"""Nodes are added for a batch and removed after it, by Ray's own autoscaler: from none to two and back to none.

Once with the command's own replicas and a deadline, once on a server of `--replicas 0:1` that has scaled to zero. Prints the figures.
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from psutil import NoSuchProcess, Process
from support.batch.command import COMMAND, BatchCommand, answers, num_results, ranks_of, wait_until, write_lines
from support.hosts.ray_hosts import RayHosts
from support.hosts.scaling_hosts import num_raylets, scaling_hosts
from support.servers.system_server import API_KEY, Server
from support.terminal import TerminalCommand

pytestmark = pytest.mark.chaos

MAX_TOKENS = 24
NUM_LINES = 800
ONE_READY, TWO_READY = r"1 of [12] replicas? ready", r"2 of 2 replicas ready"


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[RayHosts]:
    hosts = scaling_hosts(tmp_path)
    try:
        assert num_raylets(hosts) == 1
        yield hosts
    finally:
        hosts.close()


def num_ranks(hosts: RayHosts) -> int:
    found = []
    for pid in hosts.processes():
        try:
            found.append(Process(pid))
        except NoSuchProcess:
            continue
    return len(ranks_of(found))


def show(title: str, figures: dict[str, float]) -> None:
    print(f"\n{title}: {json.dumps({name: round(value, 1) for name, value in figures.items()})}", flush=True)


def timed_run(hosts: RayHosts, source: Path, out: Path, *options: str) -> dict[str, float]:
    """Runs a whole `batch run` and returns a timeline: seconds from its start until the last node is gone."""
    store = out.with_name(f"{out.name}.tramontane") / "batches.db"
    command = [str(COMMAND), "batch", "run", str(source), "-o", str(out), "--ray-address", hosts.address, *options]
    terminal = TerminalCommand(command, env=hosts.env)
    began, figures = terminal.began, {}
    answered_at_two = None
    answered = most_nodes = 0
    try:
        while terminal.is_running:
            assert time.monotonic() - began < 600, terminal.output[-2000:]
            nodes, answered = num_raylets(hosts) - 1, max(answered, num_results(store))
            for name, condition in {
                "first node": nodes >= 1,
                "second node": nodes >= 2,
                "first replica ready": terminal.first(ONE_READY) is not None,
                "first answers": answered > 0,
                "second replica ready": terminal.first(TWO_READY) is not None,
            }.items():
                if condition:
                    figures.setdefault(name, time.monotonic() - began)
            if answered_at_two is None and "second replica ready" in figures:
                answered_at_two = answered
            most_nodes = max(most_nodes, nodes)
            time.sleep(0.1)
        ended = time.monotonic()
        assert terminal.process.returncode == 0, terminal.output[-3000:]
        assert num_ranks(hosts) == 0, "the replicas are removed before the command ends"
        figures["all answered"] = ended - began
        with_one = NUM_LINES if answered_at_two is None else answered_at_two
        figures["lines/s with one"] = with_one / (
            figures.get("second replica ready", ended - began) - figures["first replica ready"]
        )
        if answered_at_two is not None:
            figures["lines/s with two"] = (NUM_LINES - with_one) / (ended - began - figures["second replica ready"])
        wait_until(lambda: num_raylets(hosts) == 1, timeout_s=200, what="the nodes are removed")
        figures["no node left, after the end"] = time.monotonic() - ended
        figures["most nodes"] = most_nodes
        return figures
    finally:
        terminal.close()


@pytest.mark.timeout(1500)
def test_nodes_are_added_for_a_command_and_removed_when_it_ends(hosts: RayHosts, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    ids = write_lines(source, NUM_LINES, max_tokens=MAX_TOKENS)

    soon = timed_run(hosts, source, tmp_path / "soon.jsonl", "--max-replicas", "2", "--max-num-seqs", "4")
    show(f"{NUM_LINES} lines as soon as possible", soon)
    assert soon["most nodes"] == 2
    assert "second replica ready" in soon

    late_options = ("--replicas", "0:2", "--deadline", "2h", "--max-num-seqs", "4")
    late = timed_run(hosts, source, tmp_path / "late.jsonl", *late_options)
    show(f"{NUM_LINES} lines within two hours", late)
    assert late["most nodes"] == 1, "one replica meets this deadline"

    answered = answers(tmp_path / "soon.jsonl")
    assert sorted(answered) == sorted(ids)
    assert answers(tmp_path / "late.jsonl") == answered


@pytest.mark.timeout(900)
def test_a_batch_wakes_a_server_that_scaled_to_zero(hosts: RayHosts, tmp_path: Path) -> None:
    source, out, data = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "data"
    ids = write_lines(source, 300, max_tokens=MAX_TOKENS)
    options = ("--ray-address", hosts.address, "--replicas", "0:1", "--scale-down-after", "5", "--data-dir", str(data))
    server = Server(*options, env=hosts.env)
    try:
        server.wait_for(lambda: not server.replicas(), timeout_s=120, what="scale to zero")
        server.wait_for(lambda: num_raylets(hosts) == 1, timeout_s=120, what="release its node")

        began = time.monotonic()
        env = {**hosts.env, "TRAMONTANE_API_KEY": API_KEY}
        command = BatchCommand("run", source, "-o", out, "--url", server.url, env=env, log=tmp_path / "log")
        try:
            figures: dict[str, float] = {}
            for name, condition in {
                "first node": lambda: num_raylets(hosts) == 2,
                "replica ready": lambda: bool(server.replicas("ready")),
                "first answers": lambda: num_results(data / "batches.db") > 0,
            }.items():
                wait_until(condition, timeout_s=200, what=f"{name}; the command: {command.output}")
                figures[name] = time.monotonic() - began
            assert command.wait(300) == 0, command.output
        finally:
            command.close()
        ended = time.monotonic()
        figures["all answered"] = ended - began
        figures["lines/s"] = len(ids) / (ended - began - figures["replica ready"])
        server.wait_for(lambda: not server.replicas(), timeout_s=120, what="scale to zero again")
        figures["no replica left, after the end"] = time.monotonic() - ended
        server.wait_for(lambda: num_raylets(hosts) == 1, timeout_s=120, what="release its node again")
        figures["no node left, after the end"] = time.monotonic() - ended
        show(f"{len(ids)} lines wake a server of 0:1", figures)
        assert sorted(answers(out)) == sorted(ids)
        assert server.health()[0] == 200
    finally:
        server.kill()
