"""Batches of 2,000 lines while every kind of process gets SIGKILL at random moments, in the three places where a batch can run.

What died is restarted as an operator would restart it. At the end each line occurs exactly once over output and error files, with the
answer of an undisturbed run. Also covers lines that kill their rank, and full and read-only disks.
"""

import contextlib
import json
import os
import random
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from support.batch.chaos import DisturbedBatch, Kill, Undisturbed, kill_rank, undisturbed
from support.batch.command import BatchCommand, answers, ranks_of, wait_until
from support.hosts.ray_hosts import RayHosts, can_make_namespaces, free_port
from support.paths import ROOT
from support.servers.system_server import API_KEY, Server

pytestmark = pytest.mark.chaos

NUM_LINES = int(os.environ.get("TRAMONTANE_CHAOS_LINES", "2000"))
MAX_TOKENS = 12
DEADLY_ENGINE = ROOT / "tests" / "support" / "batch" / "deadly_engine"
DEADLY_SEED = 66_666
DEADLY_LINES = (7, 108)
SEED = int(os.environ.get("TRAMONTANE_CHAOS_SEED", "5"))


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return undisturbed(tmp_path_factory.mktemp("undisturbed"), num_lines=NUM_LINES, max_tokens=MAX_TOKENS)


@pytest.mark.timeout(1500)
def test_on_a_ray_of_its_own(reference: Undisturbed, tmp_path: Path) -> None:
    chance = random.Random(SEED)
    batch = DisturbedBatch(tmp_path, reference, log=tmp_path / "log")

    def kill_ray() -> None:
        """Kills the node of this Ray, which only the command can restart."""
        for process in batch.command.descendants():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        assert batch.command.wait(100) == 1
        assert "has probably ended" in batch.command.output
        assert "Nothing is lost" in batch.command.output
        batch.resume()

    kills = [
        *[Kill("command and store", batch.kill_command)] * 6,
        *[Kill("rank", lambda: kill_rank(batch.command.descendants, chance))] * 4,
        Kill("Ray, all of it", kill_ray),
    ]
    try:
        batch.disturb(kills, chance)
        batch.check_end()
    finally:
        batch.command.close()


class TwoNodes:
    """A Ray cluster of two nodes with one CPU each, each in a network namespace, where processes die and nodes return."""

    def __init__(self) -> None:
        self.hosts = RayHosts([1, 1])
        self._coming: threading.Thread | None = None

    def processes(self, *numbers: int) -> list[psutil.Process]:
        """The processes of these nodes."""
        wanted = {Path(f"/run/netns/{self.hosts.namespaces[n]}").stat().st_ino for n in numbers}
        found = []
        for pid in self.hosts.processes():
            with contextlib.suppress(OSError, psutil.NoSuchProcess):
                if Path(f"/proc/{pid}/ns/net").stat().st_ino in wanted:
                    found.append(psutil.Process(pid))
        return found

    def kill_second(self) -> None:
        """The node returns while the batch continues, or is killed again while it starts."""
        self._end(1)
        self._coming = threading.Thread(target=self._bring_back)
        self._coming.start()

    def kill_both(self) -> None:
        """Kills everything that runs on both nodes."""
        self._end(0, 1)
        self.hosts.start(0, 1)
        self.hosts.start(1, 1)

    def kill_controller(self) -> None:
        for process in self.processes(0, 1):
            with contextlib.suppress(psutil.Error):
                if "ControllerActor" in "".join(process.cmdline()[:1]):
                    process.kill()

    def close(self) -> None:
        if self._coming is not None:
            self._coming.join()
        self.hosts.close()

    def _bring_back(self) -> None:
        with contextlib.suppress(AssertionError):  # killed as it started; the killer restarts it
            self.hosts.start(1, 1)

    def _end(self, *numbers: int) -> None:
        for _ in range(2):  # the second time for what a start had just begun
            gone = self.processes(*numbers)
            for process in gone:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(gone, timeout=20)
            if self._coming is not None:
                self._coming.join()


@pytest.fixture
def nodes() -> Iterator[TwoNodes]:
    if not can_make_namespaces():
        pytest.skip("needs root and network namespaces, for a node that can die")
    nodes = TwoNodes()
    try:
        yield nodes
    finally:
        nodes.close()


@pytest.mark.timeout(1500)
def test_on_a_ray_cluster_of_two_nodes(reference: Undisturbed, tmp_path: Path, nodes: TwoNodes) -> None:
    chance = random.Random(SEED + 1)
    options = ("--ray-address", nodes.hosts.address, "--replicas", "2")
    how = {"prefix": nodes.hosts.prefix(0), "env": nodes.hosts.env}
    batch = DisturbedBatch(tmp_path, reference, log=tmp_path / "log", options=options, **how)

    def kill_all() -> None:
        nodes.kill_both()
        batch.kill_command()

    kills = [
        *[Kill("command and store", batch.kill_command)] * 20,
        *[Kill("rank", lambda: kill_rank(lambda: nodes.processes(0, 1), chance))] * 16,
        *[Kill("controller", nodes.kill_controller)] * 6,
        *[Kill("node", nodes.kill_second)] * 6,
        *[Kill("both nodes", kill_all)] * 2,
    ]
    assert len(kills) == 50
    try:
        batch.disturb(kills, chance)
        batch.check_end()
        wait_until(lambda: not ranks_of(nodes.processes(0, 1)), timeout_s=60, what="the replicas are removed")
    finally:
        batch.command.close()


@pytest.mark.timeout(1500)
def test_on_a_server(reference: Undisturbed, tmp_path: Path) -> None:
    chance = random.Random(SEED + 2)
    options = ("--port", str(free_port()), "--data-dir", str(tmp_path / "data"))
    server = Server(*options)

    def kill_server() -> None:
        nonlocal server
        server.process.kill()
        server.process.wait()
        server.kill()  # its remaining processes
        server = Server(*options)
        if not batch.command.is_running:  # its server died before it had the batch
            assert batch.num_done == 0, batch.command.output
            batch.restart()

    with contextlib.ExitStack() as stack:
        stack.callback(lambda: server.kill())  # the last one started
        batch = DisturbedBatch(
            tmp_path,
            reference,
            log=tmp_path / "log",
            options=("--url", server.url),
            store=tmp_path / "data" / "batches.db",
            env={**os.environ, "TRAMONTANE_API_KEY": API_KEY},
        )
        stack.callback(lambda: batch.command.close())
        kills = [
            *[Kill("server and store", kill_server)] * 4,
            *[Kill("command", batch.kill_command)] * 3,
            *[Kill("rank", lambda: kill_rank(server.all_descendants, chance))] * 3,
        ]
        batch.disturb(kills, chance)
        batch.check_end()


@pytest.mark.timeout(600)
def test_lines_that_kill_their_rank_are_skipped_and_the_others_answered(reference: Undisturbed, tmp_path: Path) -> None:
    source, log = tmp_path / "in.jsonl", tmp_path / "log"
    lines = [json.loads(line) for line in reference.source.read_text().splitlines()[:200]]
    for i in DEADLY_LINES:
        lines[i]["body"]["seed"] = DEADLY_SEED
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = os.pathsep.join([str(DEADLY_ENGINE), *filter(None, [os.environ.get("PYTHONPATH")])])
    batch = BatchCommand("run", source, "-o", tmp_path / "out.jsonl", log=log, env={**os.environ, "PYTHONPATH": path})
    began = time.monotonic()
    try:
        assert batch.wait(500) == 1, batch.output
    finally:
        batch.close()
    found = answers(tmp_path / "out.jsonl", tmp_path / "out.errors.jsonl")
    deadly = {reference.ids[i] for i in DEADLY_LINES}
    assert {i for i, answer in found.items() if answer["error"]} == deadly
    for i in deadly:
        assert found[i]["error"]["code"] == "replica_crashed"
        assert "2 replicas ended while they worked on this request and nothing else" in found[i]["error"]["message"]
    assert {i: found[i] for i in found if i not in deadly} == {
        i: reference.answers[i] for i in found if i not in deadly
    }
    num_deaths = batch.output.count("cluster.batch.run.window: A replica died")
    print(
        f"{len(deadly)} deadly lines of {len(found)}: {num_deaths} deaths, {time.monotonic() - began:.0f} s", flush=True
    )
    assert num_deaths <= 4 * len(deadly), "in groups of 80 and 10 lines, and alone twice"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of two megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True, check=False)
    if made.returncode:
        pytest.skip("needs the right to mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.timeout(900)
def test_a_full_and_a_read_only_disk_lose_nothing(reference: Undisturbed, small_disk: Path, tmp_path: Path) -> None:
    batch = DisturbedBatch(small_disk, reference, log=tmp_path / "log")
    try:
        assert batch.command.wait(300) == 1
        done = batch.num_done
        print(f"full: {batch.command.output.splitlines()[-2:]}, {done} lines kept", flush=True)
        assert "full" in batch.command.output
        assert f"Continue with `tramontane batch resume {batch.out}`." in batch.command.output
        assert "Traceback" not in batch.command.output
        assert 0 < done < NUM_LINES

        subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
        refused = BatchCommand("resume", batch.out, log=tmp_path / "refused.log")
        assert refused.wait(100) == 1
        print(f"read-only: {refused.output.splitlines()}", flush=True)
        assert "cannot be" in refused.output
        assert "Traceback" not in refused.output
        subprocess.run(["mount", "-o", "remount,rw,size=64m", small_disk], check=True)
        assert batch.num_done == done

        batch.resume()
        batch.check_end()
        assert not batch.store.exists()
    finally:
        batch.command.close()
