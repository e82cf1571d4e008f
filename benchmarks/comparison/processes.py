"""Starts what is measured as processes of their own, and ends each of them by its pid. Knows commands and ports, no engine."""

import asyncio
import json
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 300
RUN_TIMEOUT_S = 900
STOP_TIMEOUT_S = 60
TAIL = 400


class MeasurementError(Exception):
    """A subject that could not be measured, with the end of what it wrote."""


@dataclass(frozen=True)
class Server:
    port: int
    ready_s: float


def run_job(command: Sequence[str], job: Mapping[str, Any], *, environment: Mapping[str, str]) -> dict[str, Any]:
    """The result of a runner: the JSON object in the last line of its output. Raises MeasurementError with the end of its errors."""
    if not Path(command[0]).exists():
        raise MeasurementError("not installed")
    try:
        done = subprocess.run(
            [*command, json.dumps(job)],
            cwd=ROOT,
            env=dict(environment),
            capture_output=True,
            text=True,
            timeout=RUN_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        raise MeasurementError(f"no result within {RUN_TIMEOUT_S} s") from None
    if done.returncode:
        raise MeasurementError(f"status {done.returncode}: {_end_of(done.stderr or done.stdout)}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


@asynccontextmanager
async def serving(
    command: Sequence[str], *, port: int, environment: Mapping[str, str], log: Path
) -> AsyncIterator[Server]:
    """A server from its command until SIGTERM has ended it. It is ready when GET /health gives 200. Its output goes to `log`."""
    if not Path(command[0]).exists():
        raise MeasurementError("not installed")
    began = time.perf_counter()
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *command, cwd=ROOT, env=dict(environment), stdout=output, stderr=output, stdin=asyncio.subprocess.DEVNULL
        )
        try:
            while not await _healthy(port):
                if process.returncode is not None:
                    raise MeasurementError(f"status {process.returncode}: {_end_of(log.read_text(errors='replace'))}")
                if time.perf_counter() - began > START_TIMEOUT_S:
                    raise MeasurementError(f"not ready within {START_TIMEOUT_S} s")
                await asyncio.sleep(0.02)
            yield Server(port, time.perf_counter() - began)
        finally:
            await _stop(process)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


async def _healthy(port: int) -> bool:
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    try:
        writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        return b" 200 " in await asyncio.wait_for(reader.readline(), timeout=10)
    except (OSError, TimeoutError):
        return False
    finally:
        writer.close()


async def _stop(process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    process.send_signal(signal.SIGTERM)
    try:
        await asyncio.wait_for(process.wait(), timeout=STOP_TIMEOUT_S)
    except TimeoutError:
        process.kill()
        await process.wait()


def _end_of(text: str) -> str:
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return (lines[-1] if lines else "no output")[-TAIL:]
