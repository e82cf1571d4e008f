"""A Ray cluster started with `ray start`, as an operator would: on this host, or on two hosts that are network namespaces.

Token authentication is on. Everything it starts carries a mark in its environment, by which `close` finds and ends it.
"""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

BIN = Path(sys.executable).parent
MARK = "TRAMONTANE_TEST_CLUSTER"
START_TIMEOUT_S = 60.0


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def can_make_namespaces() -> bool:
    """Root, iproute2 and a kernel that lets us."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    name = f"tm-probe-{secrets.token_hex(2)}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode == 0
    if made:
        subprocess.run(["ip", "netns", "del", name], check=False)
    return made


class RayHosts:
    """`cpus[i]` logical CPUs on host i. With one host it is this machine's loopback; with two, two namespaces and a veth pair."""

    def __init__(
        self,
        cpus: Sequence[int],
        *,
        port: int | None = None,
        head_options: Sequence[str] = (),
        head_env: dict[str, str] | None = None,
    ) -> None:
        assert len(cpus) in (1, 2)
        self._id = secrets.token_hex(2)
        self.folder = Path(tempfile.mkdtemp(prefix=f"tm-{self._id}-", dir="/tmp"))  # short: sockets live in it
        self.namespaces = [f"tm-{self._id}-{i}" for i in range(len(cpus))] if len(cpus) > 1 else []
        self.ips = ["10.77.0.1", "10.77.0.2"] if self.namespaces else ["127.0.0.1"]
        self.port = port or free_port()
        self.address = f"{self.ips[0]}:{self.port}"
        token_file = self.folder / "token"
        token_file.write_text(secrets.token_hex(32))
        token_file.chmod(0o600)
        self.env = {
            **{k: v for k, v in os.environ.items() if not k.startswith("RAY_")},
            MARK: self._id,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token_file),
            "RAY_USAGE_STATS_ENABLED": "0",
            **(head_env or {}),
        }
        try:
            if self.namespaces:
                self._make_network()
            for i, count in enumerate(cpus):
                self.start(i, count, head_options if i == 0 else ())
        except BaseException:
            self.close()
            raise

    def prefix(self, host: int = 0) -> list[str]:
        """What a command line begins with to run on that host."""
        return ["ip", "netns", "exec", self.namespaces[host]] if self.namespaces else []

    def cut(self) -> None:
        """The cable between the two hosts is pulled."""
        _run([*self.prefix(0), "ip", "link", "set", "eth0", "down"])

    def heal(self) -> None:
        _run([*self.prefix(0), "ip", "link", "set", "eth0", "up"])

    def processes(self) -> list[int]:
        """Every living process that was started on these hosts, by us or by one of ours."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                marked = f"{MARK}={self._id}".encode() in (path / "environ").read_bytes().split(b"\0")
                # Ray's fake nodes get an environment of their own, but their command line names our folder.
                if marked or str(self.folder).encode() in (path / "cmdline").read_bytes():
                    found.append(int(path.name))
        return found

    def named(self, word: str) -> list[psutil.Process]:
        """Those of its living processes with the word in their name."""
        found = []
        for pid in self.processes():
            with contextlib.suppress(psutil.Error):  # it has ended since
                process = psutil.Process(pid)
                if word in " ".join(process.cmdline()[:1]):
                    found.append(process)
        return found

    def close(self) -> None:
        """Ends every process of these hosts, then the hosts."""
        deadline = time.monotonic() + 60
        while (pids := self.processes()) and time.monotonic() < deadline:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        for name in self.namespaces:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
        shutil.rmtree(self.folder, ignore_errors=True)
        assert not pids, f"processes {pids} of the test's Ray cannot be ended"

    def _make_network(self) -> None:
        for name in self.namespaces:
            _run(["ip", "netns", "add", name])
            _run(["ip", "-n", name, "link", "set", "lo", "up"])
        a, b = self.namespaces
        _run(["ip", "link", "add", "eth0", "netns", a, "type", "veth", "peer", "name", "eth0", "netns", b])
        for name, ip in zip(self.namespaces, self.ips, strict=True):
            _run(["ip", "-n", name, "addr", "add", f"{ip}/24", "dev", "eth0"])
            _run(["ip", "-n", name, "link", "set", "eth0", "up"])

    def start(self, host: int, num_cpus: int, options: Sequence[str] = ()) -> None:
        """The node on that host, which must not run, or not any more."""
        # A dashboard is several processes, which no test looks at.
        place = ["--head", f"--port={self.port}", "--include-dashboard=false"]
        self._ray_start(host, num_cpus, [*(place if host == 0 else [f"--address={self.address}"]), *options])

    def add_node(self, num_cpus: int, *, num_gpus: int) -> None:
        """One more node on the first host. The GPUs are only declared."""
        self._ray_start(0, num_cpus, [f"--address={self.address}", f"--num-gpus={num_gpus}"])

    def _ray_start(self, host: int, num_cpus: int, options: Sequence[str]) -> None:
        command = [
            *self.prefix(host), str(BIN / "ray"), "start", "--block", f"--num-cpus={num_cpus}", "--num-gpus=0",
            f"--node-ip-address={self.ips[host]}", "--object-store-memory=100000000", f"--temp-dir={self.folder}",
            *options,
        ]  # fmt: skip
        log = self.folder / f"host{host}-{secrets.token_hex(2)}.log"
        with log.open("w") as f:
            process = subprocess.Popen(command, stdout=f, stderr=f, env=self.env, start_new_session=True)
        deadline = time.monotonic() + START_TIMEOUT_S
        while "Ray runtime started" not in log.read_text():
            assert process.poll() is None, f"`ray start` ended:\n{log.read_text()}"
            assert time.monotonic() < deadline, f"`ray start` did not come up:\n{log.read_text()}"
            time.sleep(0.05)


def _run(command: Sequence[str]) -> None:
    subprocess.run(command, check=True, capture_output=True)
