"""A real `tramontane serve` as a subprocess: what it says, its health, its ranks' processes, and what it leaves behind."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import psutil

COMMAND = Path(sys.executable).parent / "tramontane"
API_KEY = "system-test-key"


class Server:
    """One `tramontane serve` process on a port of its own choice. `output` is all it has said so far, on stderr."""

    def __init__(self, *options: str) -> None:
        self.process = subprocess.Popen(
            [str(COMMAND), "serve", "--port", "0", *options],
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, "TRAMONTANE_API_KEY": API_KEY},
        )
        self._lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            self.wait_for(lambda: "Stop  " in self.output, timeout_s=100, what="become ready")
            self.url = re.search(r"http://127\.0\.0\.1:\d+(?=/v1\n)", self.output)[0]
            self.descendants = psutil.Process(self.process.pid).children(recursive=True)
            self.ranks = self._find_ranks()
            self.folder = Path(self.ranks[0].environ()["TRAMONTANE_RAY_FOLDER"])
        except BaseException:
            self.kill()
            raise

    @property
    def output(self) -> str:
        return "".join(self._lines)

    def get(self, path: str) -> tuple[int, str]:
        request = urllib.request.Request(self.url + path, headers={"Authorization": f"Bearer {API_KEY}"})
        try:
            with urllib.request.urlopen(request, timeout=10) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as e:
            return e.code, e.read().decode()

    def health(self) -> tuple[int, dict]:
        status, body = self.get("/health")
        return status, json.loads(body)

    def metric(self, name: str) -> float:
        """The sum over replicas."""
        _, text = self.get("/metrics")
        values = [float(line.split()[-1]) for line in text.splitlines() if re.match(rf"tramontane:{name}[ {{]", line)]
        assert values, f"/metrics has no {name}"
        return sum(values)

    def wait_for(self, condition: Callable[[], bool], *, timeout_s: float, what: str) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert self.process.poll() is None, f"the server ended instead of what was awaited ({what}):\n{self.output}"
            assert time.monotonic() < deadline, f"the server did not {what} in {timeout_s:g} s:\n{self.output}"
            time.sleep(0.05)

    def left_over(self) -> list[str]:
        """What of this server is still there some seconds after its end."""
        _, alive = psutil.wait_procs(self.descendants, timeout=10)
        return [f"process {p.pid} {p.cmdline()[:2]}" for p in alive] + [str(f) for f in [self.folder] if f.exists()]

    def kill(self) -> None:
        """Whatever state it is in, it and its descendants are gone afterwards."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self.descendants = psutil.Process(self.process.pid).children(recursive=True)
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(20)
        for process in [self.process, *getattr(self, "descendants", [])]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()
        self._reader.join(5)
        self.process.stderr.close()

    def _find_ranks(self) -> list[psutil.Process]:
        workers = [p for p in self.descendants if p.cmdline() and "ShardWorker" in p.cmdline()[0]]
        leads = [any(c.status == "LISTEN" and c.laddr.ip == "127.0.0.1" for c in p.net_connections()) for p in workers]
        assert leads.count(True) == 1, "exactly rank 0 listens for the gateway on loopback"
        return sorted(workers, key=lambda p: not leads[workers.index(p)])

    def _read(self) -> None:
        for line in self.process.stderr:
            self._lines.append(line)
