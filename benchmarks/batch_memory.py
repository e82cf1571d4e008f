"""A batch of a million lines, with an executor that answers at once: lines per second of each phase, and the memory.

Each size runs in its own process, for its own peak of resident memory; the input is generated before. The executor answers
at once, so that only the store, the files and the runner are measured. Writes a Markdown table.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import platform
import resource
import sqlite3
import sys
import tempfile
import time
from contextlib import aclosing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from cluster.batch.records import BatchRecord, FileRecord, Line, LineResult, new_batch_id, new_file_id
from cluster.batch.run.runner import RunnerOptions, run_batch
from cluster.batch.store.open import open_files, open_store

SIZES = (10_000, 100_000, 1_000_000)
CAPACITY = 512
ENDPOINT = "/v1/completions"
PHASES = ("validate", "plan", "run", "output", "purge")


class _Model(msgspec.Struct):
    model: str


class InstantExecutor:
    """Always answers with the same 300 bytes."""

    capacity = CAPACITY

    def __init__(self) -> None:
        self._decoder = msgspec.json.Decoder(_Model)
        text = "An answer of a few words, as a summary has them. " * 4
        choices = [{"index": 0, "text": text, "logprobs": None, "finish_reason": "length"}]
        self._body = json.dumps({"id": "cmpl-0", "object": "text_completion", "choices": choices}).encode()

    def check(self, endpoint: str, body: bytes, *, owner: str) -> str:
        return self._decoder.decode(body).model

    async def execute(self, line: Line, *, endpoint: str, body: bytes, seed: int, owner: str) -> LineResult:
        await asyncio.sleep(0)
        return LineResult(
            number=line.number,
            status_code=200,
            request_id="req-0",
            body=self._body,
            num_prompt_tokens=50,
            num_output_tokens=40,
        )


class Phases:
    """When each phase of a runner began, as seen from its calls to the store."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self.began: dict[str, float] = {}

    def __getattr__(self, name: str) -> Any:
        phase = {"clear_lines": "validate", "plan": "plan", "suspects": "run", "finalize": "output", "purge": "purge"}
        if name in phase:
            self.began.setdefault(phase[name], time.perf_counter())
        return getattr(self._store, name)


def write_input(path: Path, num_lines: int) -> None:
    """Groups of a hundred prompts with the same beginning, lengths between 1 and 256 tokens."""
    with path.open("wb") as file:
        for i in range(num_lines):
            prompt = f"Document {i // 100}: {'the same opening of a hundred prompts, ' * 6}. Question {i}?"
            body = {"model": "demo", "prompt": prompt, "max_tokens": 1 + (i * 7919) % 256, "temperature": 0}
            line = {"custom_id": f"request-{i}", "method": "POST", "url": ENDPOINT, "body": body}
            file.write(msgspec.json.encode(line) + b"\n")


async def measure(folder: Path, source: Path) -> dict[str, float]:
    """Seconds of each phase, the peak of resident memory and how much of it was there before the batch, in MiB."""
    store, files = open_store(folder), open_files(folder)
    phases = Phases(store)
    file_id, now = new_file_id(), int(time.time())

    async def chunks():
        with source.open("rb") as file:
            while chunk := file.read(1024 * 1024):
                yield chunk

    async with aclosing(chunks()) as stream:
        num_bytes = await files.write(file_id, stream)
    await store.add_file(
        FileRecord(id=file_id, filename="in.jsonl", purpose="batch", num_bytes=num_bytes, created_at=now)
    )
    batch = BatchRecord(
        id=new_batch_id(),
        endpoint=ENDPOINT,
        input_file_id=file_id,
        completion_window="24h",
        created_at=now,
        expires_at=now + 86_400,
    )
    await store.add_batch(batch)
    before = peak_mib()
    ended = await run_batch(phases, files, InstantExecutor(), batch.id, options=RunnerOptions())
    end = time.perf_counter()
    assert ended.status == "completed", ended
    assert ended.output_file_id is not None
    with files.open(ended.output_file_id) as output:
        num_answers = sum(1 for _ in output)
    assert num_answers == ended.num_lines == ended.num_completed
    await store.close()
    starts = [phases.began[phase] for phase in PHASES] + [end]
    seconds = {phase: starts[i + 1] - starts[i] for i, phase in enumerate(PHASES)}
    return seconds | {"before": before, "peak": peak_mib(), "input_mib": num_bytes / 2**20}


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def machine() -> str:
    """Without torch, which benchmarks/machine.py needs."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores, {platform.system()}, SQLite {sqlite3.sqlite_version}"


def _child(source: str, queue: "multiprocessing.Queue[dict[str, float]]") -> None:
    with tempfile.TemporaryDirectory(dir=Path(source).parent) as folder:
        queue.put(asyncio.run(measure(Path(folder), Path(source))))


def measure_apart(num_lines: int, folder: Path) -> dict[str, float]:
    source = folder / f"{num_lines}.jsonl"
    write_input(source, num_lines)
    context = multiprocessing.get_context("spawn")
    queue: multiprocessing.Queue[dict[str, float]] = context.Queue()
    process = context.Process(target=_child, args=(str(source), queue))
    process.start()
    found = queue.get(timeout=3600)
    process.join()
    source.unlink()
    return found


def table(measured: dict[int, dict[str, float]]) -> str:
    head = ["lines", "input", *(f"{phase}, lines/s" for phase in PHASES), "whole", "memory before", "peak memory"]
    rows = [head, ["---:"] * len(head)]
    for num_lines, found in measured.items():
        total = sum(found[phase] for phase in PHASES)
        speeds = [f"{num_lines / found[phase]:,.0f}" for phase in PHASES]
        memory = [f"{found['before']:.0f} MiB", f"{found['peak']:.0f} MiB"]
        rows.append([f"{num_lines:,}", f"{found['input_mib']:.0f} MiB", *speeds, f"{total:.1f} s", *memory])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


REPORT = """# A million lines in bounded memory

`python benchmarks/batch_memory.py`, {date}, on {machine}. SQLite and files on the local disk; an executor that answers at once with some
300 bytes; {capacity} lines under way; results stored in groups every 50 ms, each group on the disk (`synchronous=FULL`) before it counts.
Each size in a process of its own. Memory is the highest resident set, and what of it Python and the modules take before the batch.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, nargs="*", default=SIZES)
    parser.add_argument("--folder", type=Path, help="folder for the files during the run (default: a temporary folder)")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    measured = {}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for num_lines in args.lines:
            measured[num_lines] = measure_apart(num_lines, Path(folder))
            print(f"{num_lines:,} lines: {measured[num_lines]}", file=sys.stderr)
    text = table(measured)
    print(text)
    if args.output is not None:
        today = datetime.now(UTC).date().isoformat()
        head = REPORT.format(date=today, machine=machine(), capacity=CAPACITY)
        args.output.write_text(f"{head}\n{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
