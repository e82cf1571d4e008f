"""`tramontane doctor` as a command against the Ray clusters of `ray_hosts`."""

import json
import subprocess
from pathlib import Path
from typing import Any

from support.hosts.ray_hosts import BIN, RayHosts, free_port

TIMEOUT_S = 150.0


def run_doctor(hosts: RayHosts, *options: str, host: int = 0) -> tuple[int, dict[str, Any]]:
    """Its exit code and its JSON. Fails if a process that it started is still running."""
    command = [*hosts.prefix(host), str(BIN / "tramontane"), "doctor", "--ray-address", hosts.address, "--json"]
    command += ["--port", str(free_port()), *options]
    done = subprocess.run(command, env=hosts.env, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.stdout, done.stderr
    assert leftovers(hosts) == []
    return done.returncode, json.loads(done.stdout)


def leftovers(hosts: RayHosts) -> list[str]:
    """Titles of the doctor's actors that are still running."""
    found = []
    for pid in hosts.processes():
        try:
            title = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode()
        except OSError:
            continue
        if "NodeProbe" in title or "ProbeRank" in title:
            found.append(title)
    return found


def messages(report: dict[str, Any], check: str, severity: str) -> list[str]:
    """Of the findings of this check with this severity."""
    return [f["sentence"] for f in report["findings"] if (f["check"], f["severity"]) == (check, severity)]
