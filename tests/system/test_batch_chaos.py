"""Batches of 2,000 lines while every kind of process is killed with SIGKILL at random moments, 50 in all, on the three places a batch runs.

After each death whoever died is started again; at the end every line is there exactly once over output and error files, with the answer of
an undisturbed run. Also full and read-only disks, and nodes that come and go with a batch on a Ray that scales itself.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from batch_command import BatchCommand, answers, num_results, ranks_of, wait_until, write_lines
from ray_hosts import RayHosts, can_make_namespaces, free_port
from scaling_hosts import num_raylets, scaling_hosts
from system_server import API_KEY, Server

pytestmark = pytest.mark.chaos

NUM_LINES = int(os.environ.get("TRAMONTANE_CHAOS_LINES", "2000"))
MAX_TOKENS = 6
SEED = int(os.environ.get("TRAMONTANE_CHAOS_SEED", "5"))
REPLICA_CRASHED = "replica_crashed"


class Batch:
    """One output, and the command that works on it, which may be killed and started again. `deaths`: by kind."""

    def __init__(
        self, folder: Path, source: Path, *, options: tuple[str, ...], store: Path | None = None, **how: Any
    ) -> None:
        self.out, self.errors, self.log = folder / "out.jsonl", folder / "out.errors.jsonl", folder / "log"
        self.store = store or folder / "out.jsonl.tramontane" / "batches.db"
        self.deaths: Counter[str] = Counter()
        self.how = how
        self.began = time.monotonic()
        self.command = BatchCommand("run", source, "-o", self.out, *options, log=self.log, **how)

    @property
    def num_done(self) -> int:
        return num_results(self.store)

    def resume(self, *options: str) -> None:
        self.command = BatchCommand("resume", self.out, *options, log=self.log, **self.how)

    def kill_command(self) -> None:
        self.command.kill()
        self.resume()

    def until(self, num_lines: int, timeout_s: float = 400.0) -> bool:
        """Until so many are answered; False if the batch is over before."""

        def reached() -> bool:
            return not self.command.is_running or self.num_done >= num_lines

        wait_until(
            reached, timeout_s=timeout_s, what=f"{num_lines} lines answered; the log:\n{self.log.read_text()[-2000:]}"
        )
        return self.command.is_running

    def run_to_the_end(self, kills: list[tuple[str, Callable[[], None]]], chance: random.Random) -> None:
        """Takes from `kills` what comes to pass before the batch is over, each at a random number of answered lines."""
        moments = sorted(chance.sample(range(NUM_LINES * 9 // 10), len(kills)))
        for moment in moments:
            if not self.until(moment):
                break
            time.sleep(chance.uniform(0, 0.3))
            kind, kill = kills.pop()
            print(f"{time.monotonic() - self.began:7.1f} s  {self.num_done:5} lines  SIGKILL {kind}", flush=True)
            kill()
            self.deaths[kind] += 1
        self.code = self.command.wait(900)

    def check(self, ids: list[str], expected: dict[str, Any]) -> None:
        """Prints the figures."""
        found = answers(self.out, self.errors)
        assert sorted(found) == sorted(ids), "a line is missing or too many"
        given_up = [i for i, a in found.items() if (a["error"] or {}).get("code") == REPLICA_CRASHED]
        wrong = [i for i in ids if i not in given_up and found[i] != expected[i]]
        figures = {
            "lines": len(found),
            "deaths": dict(self.deaths),
            "wrong": len(wrong),
            "given up as poison": len(given_up),
        }
        print(json.dumps(figures | {"seconds": round(time.monotonic() - self.began)}), flush=True)
        assert wrong == [], f"{wrong[:3]}: {found[wrong[0]]} instead of {expected[wrong[0]]}"
        # An innocent line is only given up when it was under way at two deaths of its replica.
        assert len(given_up) <= self.deaths["rank"] + self.deaths["node"]
        assert self.code == (1 if self.errors.exists() else 0)


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], dict[str, Any]]:
    """The input, its custom_ids, and the answers of a run that nobody disturbs."""
    folder = tmp_path_factory.mktemp("undisturbed")
    source = folder / "in.jsonl"
    ids = write_lines(source, NUM_LINES, max_tokens=MAX_TOKENS, bad_every=400)
    began = time.monotonic()
    command = BatchCommand("run", source, "-o", folder / "out.jsonl", log=folder / "log")
    assert command.wait(1200) == 1, command.output
    expected = answers(folder / "out.jsonl", folder / "out.errors.jsonl")
    assert sorted(expected) == sorted(ids)
    print(f"undisturbed: {NUM_LINES} lines in {time.monotonic() - began:.0f} s", flush=True)
    return source, ids, expected


def in_random_order(
    chance: random.Random, kinds: dict[str, tuple[int, Callable[[], None]]]
) -> list[tuple[str, Callable[[], None]]]:
    """kinds: how often, and how."""
    order = [(kind, kill) for kind, (count, kill) in kinds.items() for _ in range(count)]
    chance.shuffle(order)
    return order


def kill_rank(processes: Callable[[], list[psutil.Process]], chance: random.Random) -> None:
    """One of those that live, or else that is being started just now."""
    wait_until(lambda: bool(ranks_of(processes())), timeout_s=120, what="a rank that could be killed")
    with contextlib.suppress(psutil.NoSuchProcess):
        chance.choice(ranks_of(processes())).kill()


def torment(
    asked: tuple[Path, list[str], dict[str, Any]],
    folder: Path,
    chance: random.Random,
    *,
    start: Callable[[Path, Path], Batch],
    kinds: Callable[[Callable[[], Batch]], dict[str, tuple[int, Callable[[], None]]]],
) -> None:
    """Batches, one after the other, until all kills have come to pass: a quick machine is done with one before."""
    source, ids, expected = asked
    batch: Batch | None = None
    kills = in_random_order(chance, kinds(lambda: batch))
    count = 0
    while kills:
        (folder / str(count)).mkdir()
        batch = start(folder / str(count), source)
        try:
            batch.run_to_the_end(kills, chance)
            batch.check(ids, expected)
        finally:
            batch.command.close()
        count += 1


@pytest.mark.timeout(3000)
def test_on_a_ray_of_its_own(asked, tmp_path):
    chance = random.Random(SEED)
    torment(
        asked,
        tmp_path,
        chance,
        start=lambda folder, source: Batch(folder, source, options=()),
        kinds=lambda batch: {
            "command and store": (6, lambda: batch().kill_command()),
            "rank": (4, lambda: kill_rank(batch().command.descendants, chance)),
        },
    )


@pytest.fixture
def hosts() -> Iterator[RayHosts]:
    if not can_make_namespaces():
        pytest.skip("needs root and network namespaces, for a node that can die")
    hosts = RayHosts([1, 1])
    try:
        yield hosts
    finally:
        hosts.close()


@pytest.mark.timeout(3000)
def test_on_a_ray_cluster_of_two_nodes(asked, tmp_path, hosts):
    chance = random.Random(SEED + 1)
    options = ("--ray-address", hosts.address, "--replicas", "2")

    def on_host(number: int) -> list[psutil.Process]:
        wanted = Path(f"/run/netns/{hosts.namespaces[number]}").stat().st_ino
        found = []
        for pid in hosts.processes():
            with contextlib.suppress(OSError, psutil.NoSuchProcess):
                if Path(f"/proc/{pid}/ns/net").stat().st_ino == wanted:
                    found.append(psutil.Process(pid))
        return found

    starting: list[threading.Thread] = []

    def kill_node() -> None:
        for thread in starting:
            thread.join()
        gone = on_host(1)
        for process in gone:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(gone, timeout=20)
        starting.append(threading.Thread(target=hosts._start, args=(1, 1, ())))
        starting[-1].start()

    def kill_controller() -> None:
        for process in on_host(0):
            with contextlib.suppress(psutil.Error):
                if "ControllerActor" in "".join(process.cmdline()[:1]):
                    process.kill()

    try:
        torment(
            asked,
            tmp_path,
            chance,
            start=lambda folder, source: Batch(folder, source, options=options, prefix=hosts.prefix(0), env=hosts.env),
            kinds=lambda batch: {
                "command and store": (14, lambda: batch().kill_command()),
                "rank": (10, lambda: kill_rank(lambda: [*on_host(0), *on_host(1)], chance)),
                "controller": (4, kill_controller),
                "node": (4, kill_node),
            },
        )
        wait_until(lambda: not ranks_of([*on_host(0), *on_host(1)]), timeout_s=60, what="the replicas are given back")
    finally:
        for thread in starting:
            thread.join()


@pytest.mark.timeout(3000)
def test_on_a_server(asked, tmp_path):
    chance = random.Random(SEED + 2)
    port, data = free_port(), tmp_path / "data"
    server = Server("--port", str(port), "--data-dir", str(data))
    env = {**os.environ, "TRAMONTANE_API_KEY": API_KEY}

    def kill_server() -> None:
        nonlocal server
        server.process.send_signal(signal.SIGKILL)
        server.process.wait()
        server.kill()
        server = Server("--port", str(port), "--data-dir", str(data))

    try:
        torment(
            asked,
            tmp_path,
            chance,
            start=lambda folder, source: Batch(
                folder, source, options=("--url", server.url), store=data / "batches.db", env=env
            ),
            kinds=lambda batch: {
                "server and store": (4, kill_server),
                "command": (3, lambda: batch().kill_command()),
                "rank": (1, lambda: kill_rank(server.all_descendants, chance)),
            },
        )
    finally:
        server.kill()


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


@pytest.mark.timeout(1500)
def test_a_full_and_a_read_only_disk_lose_nothing(asked, small_disk, tmp_path):
    source, ids, expected = asked
    batch = Batch(small_disk, source, options=())
    batch.log.touch()
    try:
        assert batch.until(NUM_LINES // 10)
        ballast = small_disk / "ballast"
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        assert batch.command.wait(300) == 1
        done = batch.num_done
        print(f"full: {batch.command.output.splitlines()[-2:]}, {done} lines kept", flush=True)
        assert (
            "full" in batch.command.output and f"`tramontane batch resume {batch.out}` goes on" in batch.command.output
        )
        assert "Traceback" not in batch.command.output
        assert done >= NUM_LINES // 10
        ballast.unlink()

        subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
        refused = BatchCommand("resume", batch.out, log=tmp_path / "log")
        assert refused.wait(100) == 1
        print(f"read-only: {refused.output.splitlines()}", flush=True)
        assert "cannot be" in refused.output and "Traceback" not in refused.output
        subprocess.run(["mount", "-o", "remount,rw,size=64m", small_disk], check=True)

        batch.resume()
        batch.code = batch.command.wait(900)
        assert batch.num_done == 0 and not batch.store.exists()
        batch.check(ids, expected)
    finally:
        batch.command.close()


@pytest.fixture
def scaling(tmp_path: Path) -> Iterator[RayHosts]:
    hosts = scaling_hosts(tmp_path)
    try:
        yield hosts
    finally:
        hosts.close()


@pytest.mark.timeout(1500)
def test_nodes_come_work_and_go_with_a_batch(asked, tmp_path, scaling):
    source, ids, expected = asked
    options = ("--ray-address", scaling.address, "--max-replicas", "2", "--max-num-seqs", "4")
    assert num_raylets(scaling) == 1
    batch = Batch(tmp_path, source, options=options, env=scaling.env)
    figures = {}
    try:
        for count in (2, 3):
            wait_until(
                lambda count=count: num_raylets(scaling) >= count or not batch.command.is_running,
                timeout_s=300,
                what=f"{count - 1} nodes",
            )
            figures[f"{count - 1} node(s) came"] = time.monotonic() - batch.began
            figures[f"lines answered by then ({count - 1})"] = batch.num_done
        batch.code = batch.command.wait(900)
        figures["all answered"] = time.monotonic() - batch.began
        wait_until(lambda: num_raylets(scaling) == 1, timeout_s=200, what="the nodes are given back")
        figures["no node left"] = time.monotonic() - batch.began
        print(json.dumps({name: round(value, 1) for name, value in figures.items()}), flush=True)
        batch.check(ids, expected)
    finally:
        batch.command.close()
