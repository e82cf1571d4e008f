"""Python processes with a fake GPU of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from cuda_host.gpus import FakeGpu

TESTS = Path(__file__).resolve().parents[1]


def environment(gpu: FakeGpu, count: int = 1) -> dict[str, str]:
    """Of a process that sees `count` GPUs, and finds the project and these tests."""
    path = os.pathsep.join((str(TESTS.parent), str(TESTS)))
    return os.environ | gpu.environment(count) | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}


def start_program(name: str, gpu: FakeGpu, *arguments: str) -> subprocess.Popen[str]:
    """One of programs/, with its output in pipes."""
    command = [sys.executable, "-m", f"cuda_host.programs.{name}", *arguments]
    return subprocess.Popen(command, env=environment(gpu), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str], timeout_s: float = 100) -> Any:
    """What it printed as JSON. Fails with its error output."""
    try:
        out, err = process.communicate(timeout=timeout_s)
    finally:
        process.kill()
    assert process.returncode == 0, err
    return json.loads(out)


def run_program(name: str, gpu: FakeGpu, *arguments: str) -> Any:
    return finish(start_program(name, gpu, *arguments))
