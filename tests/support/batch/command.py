"""A real `tramontane batch` as a subprocess that can be started, killed and resumed, and readers for its output and error files."""

import contextlib
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

COMMAND = Path(sys.executable).parent / "tramontane"


class BatchCommand:
    """One `tramontane batch ...` process. `output`: its stderr so far. prefix: put in front of the command line."""

    def __init__(
        self, *arguments: str | Path, env: Mapping[str, str] | None = None, log: Path, prefix: Sequence[str] = ()
    ) -> None:
        self._log = log
        self._from = log.stat().st_size if log.exists() else 0
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                [*prefix, str(COMMAND), "batch", *map(str, arguments)],
                stdout=subprocess.DEVNULL,
                stderr=file,
                start_new_session=True,
                env=dict(os.environ if env is None else env),
            )

    @property
    def output(self) -> str:
        return self._log.read_bytes()[self._from :].decode(errors="replace")

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    def descendants(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self.process.pid).children(recursive=True)
        return []

    def wait(self, timeout_s: float) -> int:
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.close()
            raise AssertionError(f"the command did not end in {timeout_s:g} s:\n{self.output[-3000:]}") from None

    def kill(self) -> None:
        """SIGKILL to this process only; its children live on."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def close(self) -> None:
        """Ends it and its descendants, whatever state they are in."""
        found = self.descendants()
        if self.is_running:
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(20)
        for process in [self.process, *found]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()


def num_results(store: Path) -> int:
    """Answered lines in a store, also while it is being written; 0 before it exists."""
    with (
        contextlib.suppress(sqlite3.Error),
        contextlib.closing(sqlite3.connect(f"file:{store}?mode=ro", uri=True)) as db,
    ):
        return db.execute("SELECT count(*) FROM results").fetchone()[0]
    return 0


def wait_until(condition: Callable[[], bool], *, timeout_s: float, what: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.02)


def write_lines(path: Path, num: int, *, max_tokens: int, seed: int = 0, bad_every: int | None = None) -> list[str]:
    """Writes a batch file of seeded requests in groups with common prefixes, and returns the custom_ids.

    bad_every: every such line is too long for the model and is rejected when it runs.
    """
    chance = random.Random(seed)
    ids = []
    with path.open("w") as file:
        for i in range(num):
            prompt = f"# part {i // 20}\ndef f{i}(x):\n" if bad_every is None or i % bad_every else "word " * 5000
            body = {
                "model": "demo_model",
                "prompt": prompt,
                "max_tokens": chance.randint(1, max_tokens),
                "temperature": 0.8,
                "seed": i,
            }
            ids.append(f"id-{i}")
            file.write(
                json.dumps({"custom_id": ids[-1], "method": "POST", "url": "/v1/completions", "body": body}) + "\n"
            )
    return ids


def answers(*paths: Path) -> dict[str, Any]:
    """custom_id -> answer, without ids, times and cache counts. Fails if a custom_id occurs twice over all files."""
    found: dict[str, Any] = {}
    for path in paths:
        for line in path.read_text().splitlines() if path.exists() else ():
            answer = json.loads(line)
            assert answer["custom_id"] not in found, f"{answer['custom_id']} occurs twice"
            found[answer["custom_id"]] = _stable(answer)
    return found


def _stable(value: Any) -> Any:
    if isinstance(value, dict):
        skipped = ("id", "created", "request_id", "prompt_tokens_details")
        return {k: _stable(v) for k, v in value.items() if k not in skipped}
    return [_stable(v) for v in value] if isinstance(value, list) else value


def ranks_of(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    """The processes among these that are ranks."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.Error):
            if "Rank" in "".join(process.cmdline()[:1]):
                found.append(process)
    return found
