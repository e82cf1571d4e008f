"""A real `tramontane serve` as a subprocess: what it says, its health, its ranks' processes, and what it leaves."""

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import psutil

COMMAND = Path(sys.executable).parent / "tramontane"
API_KEY = "system-test-key"


class Server:
    """One `tramontane serve` process on a port of its own choice. `output` is all it has said so far, on stderr.

    prefix: what the command line begins with, for a server in a network namespace, which only that namespace's commands reach.
    """

    def __init__(self, *options: str, prefix: Sequence[str] = (), env: Mapping[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            [*prefix, str(COMMAND), "serve", "--port", "0", *options],
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**(os.environ if env is None else env), "TRAMONTANE_API_KEY": API_KEY},
        )
        self._lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            self.wait_for(lambda: "Stop  " in self.output, timeout_s=200, what="become ready")
            self.url = re.search(r"http://[\d.]+:\d+(?=/v1\n)", self.output)[0]
            self.descendants = self.all_descendants()
            folders = [f for f in map(_ray_folder, self.descendants) if f is not None]
            self.folder = folders[0] if folders else None  # of a Ray of its own
        except BaseException:
            self.kill()
            raise

    @property
    def output(self) -> str:
        return "".join(self._lines)

    def get(self, path: str, *, url: str | None = None) -> tuple[int, str]:
        """From the first gateway, or from the one at `url`."""
        request = urllib.request.Request((url or self.url) + path, headers={"Authorization": f"Bearer {API_KEY}"})
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as e:
            return e.code, e.read().decode()

    def post(self, path: str, body: object) -> tuple[int, str]:
        request = urllib.request.Request(
            self.url + path,
            data=json.dumps(body).encode(),
            headers={"Authorization": f"Bearer {API_KEY}", "Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as e:
            return e.code, e.read().decode()

    def all_descendants(self) -> list[psutil.Process]:
        """Every process it has started, directly or not, that lives now."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def health(self) -> tuple[int, dict]:
        status, body = self.get("/health")
        return status, json.loads(body)

    def replicas(self, state: str | None = None) -> dict[str, dict]:
        """The replicas by id as the operator sees them, those in `state` only if it is given."""
        status, body = self.get("/admin/cluster")
        assert status == 200, body
        return {r["replica_id"]: r for r in json.loads(body)["replicas"] if state in (None, r["state"])}

    def rank(self, replica_id: str, rank: int) -> psutil.Process:
        """The process of a rank on this machine."""
        return psutil.Process(self.replicas()[replica_id]["ranks"][rank]["pid"])

    def wait_ready(self, count: int, timeout_s: float = 60.0) -> None:
        """For the controller and for the gateway: of a replica that was killed a moment ago, only one of them may know."""

        def is_ready() -> bool:
            _, health = self.health()
            return len(self.replicas("ready")) == sum(r["ready"] for r in health["replicas"]) == count

        self.wait_for(is_ready, timeout_s=timeout_s, what=f"have {count} replicas")

    def complete(self, **body: object) -> dict:
        """A whole answer of /v1/completions."""
        with urllib.request.urlopen(self.request(body), timeout=120) as response:
            return json.load(response)

    def stream(self, **body: object) -> Iterator[dict]:
        """The events of a streamed answer, [DONE] checked and left out."""
        with urllib.request.urlopen(self.request({**body, "stream": True}), timeout=120) as response:
            for line in response:
                if line.startswith(b"data: {"):
                    event = json.loads(line[6:])
                    assert "error" not in event, event
                    yield event
                elif line.startswith(b"data: [DONE]"):
                    return
        raise AssertionError("the stream ended without [DONE]")

    def request(self, body: Mapping[str, object]) -> urllib.request.Request:
        return urllib.request.Request(
            f"{self.url}/v1/completions",
            data=json.dumps({"model": "demo_model", **body}).encode(),
            headers={"Authorization": f"Bearer {API_KEY}", "Content-Type": "application/json"},
        )

    def metric(self, name: str, *, url: str | None = None) -> float:
        """The sum over replicas, as the first gateway counts it, or the one at `url`."""
        _, text = self.get("/metrics", url=url)
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
        _, alive = psutil.wait_procs(self.descendants, timeout=30)
        found = [str(self.folder)] if self.folder is not None and self.folder.exists() else []
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                found.append(f"process {process.pid} {process.cmdline()[:2]}")
        return found

    def kill(self) -> None:
        """Whatever state it is in, it and its descendants are gone afterwards."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self.descendants = self.all_descendants()
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

    def _read(self) -> None:
        for line in self.process.stderr:
            self._lines.append(line)


def _ray_folder(process: psutil.Process) -> Path | None:
    with contextlib.suppress(psutil.Error):
        folder = process.environ().get("TRAMONTANE_RAY_FOLDER")
        return Path(folder) if folder else None
    return None
