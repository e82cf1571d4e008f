"""The kernels on a small case under NVIDIA's compute-sanitizer, which finds accesses outside of a tensor and races in shared memory."""

import shutil
import subprocess
import sys

from workers.gpu_check.report import Report

TOOLS = ("memcheck", "racecheck")
TIMEOUT_S = 90


def check(report: Report) -> None:
    command = shutil.which("compute-sanitizer")
    if command is None:
        report.add("compute-sanitizer", "left out", "it is not installed")
        return
    for tool in TOOLS:
        if not report.has_time:
            report.add(f"compute-sanitizer {tool}", "left out", "the time is up")
            continue
        small = [sys.executable, "-m", "workers.gpu_check", "--only", "small"]
        try:
            done = subprocess.run(
                [command, "--tool", tool, "--error-exitcode", "9", *small],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            report.add(f"compute-sanitizer {tool}", "left out", f"it took more than {TIMEOUT_S} s")
            continue
        last = (done.stdout.strip().splitlines() or ["no output"])[-1]
        report.check(f"compute-sanitizer {tool}", done.returncode == 0, last)
