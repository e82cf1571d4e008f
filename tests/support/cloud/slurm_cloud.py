"""A cloud on one machine: a Slurm controller and two nodes in network namespaces, and the laptop from which SkyPilot drives them.

Knows: namespaces, the nodes' files, and how a node dies and comes back. Does not know SkyPilot's commands (sky_client.py) or where
packages come from (cloud_packages.py). Everything lives in the PID namespace of one process, the laptop's first, which the kernel ends
with the test's process, however that ends: no process, mount or link can outlive it. The folder `build/cloud/lab` is removed by `close`,
or by the next start.
"""

import fcntl
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

from support.paths import ROOT

CHECKOUT = ROOT
BUILD = CHECKOUT / "build" / "cloud"
FILES = CHECKOUT / "tests" / "cloud" / "slurm"
CLUSTER = "lab"  # SkyPilot's name for the Slurm cluster
PARTITION = "gpu"
LAPTOP_IP = "10.77.0.254"
NODE_IPS = {"c0": "10.77.0.1", "n1": "10.77.0.11", "n2": "10.77.0.12"}
START_TIMEOUT_S = 120.0


class SlurmCloud:
    """Running when created, removed by `close`.

    wheels: the folder of wheels from which the nodes install; uv: the binary they have; pythons: their installations of Python.
    """

    def __init__(self, *, wheels: Path, uv: Path, pythons: Sequence[Path]) -> None:
        BUILD.mkdir(parents=True, exist_ok=True)
        self._lock = (BUILD / "lock").open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)  # in case these tests already run in this checkout
        self.lab = BUILD / "lab"
        self.home = self.lab / "laptop" / "home"
        self._pythons = pythons
        self._nodes: dict[str, subprocess.Popen] = {}
        shutil.rmtree(self.lab, ignore_errors=True)
        self._laptop: subprocess.Popen | None = None
        try:
            self._write_files(wheels, uv)
            self._laptop = self._start_laptop()
            self._start_internet()
            for name in NODE_IPS:
                self.start_node(name)
            self.wait_for(lambda: self.node_states() == {"n1": "idle", "n2": "idle"}, what="Slurm's nodes to be idle")
        except BaseException:
            self.close()
            raise

    def popen(
        self, command: Sequence[str | Path], *, env: Mapping[str, str] | None = None, **options
    ) -> subprocess.Popen:
        """A process on the laptop, in its network and PID namespaces. Killing the result kills it, but not the processes it has started."""
        init = psutil.Process(self._laptop.pid).children()[0].pid
        inside = ["nsenter", f"--target={init}", "--mount", "--net", "--pid", f"--wdns={CHECKOUT}"]
        command = [*inside, "setpriv", "--pdeathsig=KILL", *map(str, command)]
        return subprocess.Popen(command, env={**self.laptop_env(), **(env or {})}, text=True, **options)

    def run(self, command: Sequence[str | Path], *, env: Mapping[str, str] | None = None, timeout_s: float = 60) -> str:
        """The stdout of a command on the laptop. An error contains both of its outputs."""
        # Files, not pipes: processes it has started may keep them open forever.
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            process = self.popen(command, env=env, stdout=out, stderr=err, stdin=subprocess.DEVNULL)
            try:
                end = f"exit code {process.wait(timeout_s)}"
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                end = f"still running after {timeout_s:.0f} s"
            said, complained = ((f.seek(0), f.read())[1] for f in (out, err))
        assert process.returncode == 0, f"{' '.join(map(str, command))}: {end}\n{said}\n{complained}"
        return said

    def ssh(self, node: str, command: str, *, timeout_s: float = 60) -> str:
        """The output of a shell command on a node."""
        quiet = ["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR"]
        key = self.lab / "keys" / "client"
        return self.run(["ssh", *quiet, "-i", key, f"root@{NODE_IPS[node]}", command], timeout_s=timeout_s)

    def node_states(self) -> dict[str, str]:
        """The states of the nodes in Slurm: idle, mixed, allocated, down."""
        return dict(line.split() for line in self.ssh("c0", "sinfo --noheader --Node --format='%N %t'").splitlines())

    def start_node(self, name: str) -> None:
        """Also restarts a killed node, without anything it had in memory or in its own folders."""
        shutil.rmtree(self.lab / "nodes" / name, ignore_errors=True)
        wire = ["ip", "link", "add", f"to-{name}", "type", "veth", "peer", "name", "eth0", "netns", name]
        for command in (
            ["ip", "netns", "add", name],
            wire,
            ["ip", "link", "set", f"to-{name}", "master", "br0", "up"],
            ["ip", "-n", name, "addr", "add", f"{NODE_IPS[name]}/24", "dev", "eth0"],
            ["ip", "-n", name, "link", "set", "eth0", "up"],
            ["ip", "-n", name, "link", "set", "lo", "up"],
        ):
            self.run(command)
        log = (self.lab / f"{name}.log").open("w")
        namespaces = ["unshare", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc"]
        script = [FILES / "node.sh", name, CHECKOUT, self.lab, *self._pythons]
        self._nodes[name] = self.popen(
            ["nsenter", f"--net=/run/netns/{name}", *namespaces, *script],
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
        )
        log.close()
        self.wait_for(lambda: self._answers(name), what=f"node {name} to answer; its log is {log.name}")

    def kill_node(self, name: str) -> None:
        """Like a power cut: ends every process at once, and the link."""
        node = self._nodes.pop(name)
        node.kill()
        node.wait()
        self.run(["ip", "link", "del", f"to-{name}"])
        self.run(["ip", "netns", "del", name])

    def wait_for(
        self, condition: Callable[[], bool], *, what: str, timeout_s: float = START_TIMEOUT_S, every_s: float = 0.3
    ) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"waited {timeout_s:.0f} s for {what}"
            time.sleep(every_s)

    def laptop_env(self) -> dict[str, str]:
        """The environment of a user whose home has only the files that `_write_files` wrote."""
        return {
            "HOME": str(self.home),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin",
            "LANG": "C.UTF-8",
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(self.lab / "wheels"),
            "SSL_CERT_FILE": str(self.lab / "keys" / "internet.pem"),
            "REQUESTS_CA_BUNDLE": str(self.lab / "keys" / "internet.pem"),
        }

    def close(self) -> None:
        if self._laptop is not None:
            self._laptop.kill()
            self._laptop.wait()
        for node in self._nodes.values():
            node.wait()
        shutil.rmtree(self.lab, ignore_errors=True)
        self._lock.close()

    def _answers(self, name: str) -> bool:
        assert self._nodes[name].poll() is None, f"node {name} ended: {(self.lab / f'{name}.log').read_text()}"
        try:
            self.ssh(name, "true", timeout_s=5)
        except AssertionError:
            return False
        return True

    def _start_laptop(self) -> subprocess.Popen:
        namespaces = ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig=KILL", *namespaces, FILES / "laptop.sh", CHECKOUT, self.lab],
            stdout=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
        )
        said = process.stdout.readline()
        assert said == "ready\n", f"the laptop's namespaces could not be made: {said}"
        return process

    def _start_internet(self) -> None:
        keys = self.lab / "keys"
        self.popen(
            [sys.executable, FILES / "laptop" / "internet.py", keys / "internet.pem", keys / "internet.key"],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def _write_files(self, wheels: Path, uv: Path) -> None:
        lab = self.lab
        for folder in ("keys", "home/.ssh", "laptop/tmp", "laptop/home/.slurm", "laptop/home/.sky"):
            (lab / folder).mkdir(parents=True)
        lab.chmod(0o755)
        shutil.copytree(FILES / "etc", lab / "etc")
        shutil.copytree(FILES / "bin", lab / "bin")
        shutil.copytree(wheels, lab / "wheels", copy_function=os.link)
        shutil.copy(uv, lab / "bin" / "uv")
        for python in self._pythons:
            for program in (python / "bin").glob("python3.1[0-9]"):
                # Not a link: a virtual environment made from a link does not find the standard library.
                wrapper = lab / "bin" / program.name
                wrapper.write_text(f'#!/bin/sh\nexec {program} "$@"\n')
                wrapper.chmod(0o755)

        for name in ("client", "host"):
            key = lab / "keys" / name
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
        shutil.copy(lab / "keys" / "client.pub", lab / "home" / ".ssh" / "authorized_keys")
        names = ["-subj", "/CN=internet", "-addext", "subjectAltName=IP:8.8.8.8"]
        pair = ["-keyout", lab / "keys" / "internet.key", "-out", lab / "keys" / "internet.pem"]
        kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
        subprocess.run(["openssl", "req", "-x509", *kind, *names, *pair], check=True, capture_output=True)
        munge = lab / "keys" / "munge"
        munge.write_bytes(secrets.token_bytes(1024))
        munge.chmod(0o400)
        shutil.chown(munge, "munge")

        (self.home / ".slurm" / "config").write_text(
            f"Host {CLUSTER}\n  HostName {NODE_IPS['c0']}\n  User root\n  IdentityFile {lab / 'keys' / 'client'}\n"
        )
        shutil.copy(FILES / "laptop" / "config.yaml", self.home / ".sky" / "config.yaml")
        shutil.copytree(FILES / "laptop" / "catalogs", self.home / ".sky" / "catalogs")
