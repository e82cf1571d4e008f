"""A batch of the real command whose processes are killed again and again, and the checks on its result."""

import contextlib
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from support.batch.command import BatchCommand, answers, num_results, ranks_of, wait_until, write_lines

SOON = 0.3  # this part of the kills comes at most MAX_PAUSE_S after the previous one, whatever is going on then
MAX_PAUSE_S = 6.0
LAST_KILL = 0.8  # about this part of the lines is answered at the last kill
END_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Undisturbed:
    """An input file, its custom_ids in order, and the answers of an undisturbed run."""

    source: Path
    ids: list[str]
    answers: dict[str, Any]


def undisturbed(folder: Path, *, num_lines: int, max_tokens: int) -> Undisturbed:
    source = folder / "in.jsonl"
    ids = write_lines(source, num_lines, max_tokens=max_tokens, bad_every=num_lines // 5)
    began = time.monotonic()
    command = BatchCommand("run", source, "-o", folder / "out.jsonl", log=folder / "log")
    assert command.wait(END_TIMEOUT_S) == 1, command.output
    found = answers(folder / "out.jsonl", folder / "out.errors.jsonl")
    assert sorted(found) == sorted(ids)
    print(f"\nundisturbed: {num_lines} lines in {time.monotonic() - began:.0f} s", flush=True)
    return Undisturbed(source, ids, found)


@dataclass(frozen=True)
class Kill:
    """`kill` ends one kind of process, and restarts what an operator would restart."""

    kind: str
    kill: Callable[[], None]


class DisturbedBatch:
    """One output and the command that works on it, which may be killed and restarted. how: arguments of BatchCommand."""

    def __init__(
        self,
        folder: Path,
        reference: Undisturbed,
        *,
        log: Path,
        options: Sequence[str] = (),
        store: Path | None = None,
        **how: Any,
    ) -> None:
        self.out, self.errors, self.log = folder / "out.jsonl", folder / "out.errors.jsonl", log
        self.store = store or folder / "out.jsonl.tramontane" / "batches.db"
        self.began = time.monotonic()
        self._reference = reference
        self._how = how
        self._deaths: Counter[str] = Counter()
        self._options = options
        self.run()

    @property
    def num_done(self) -> int:
        return num_results(self.store)

    def run(self) -> None:
        command = ("run", self._reference.source, "-o", self.out, *self._options)
        self.command = BatchCommand(*command, log=self.log, **self._how)

    def resume(self) -> None:
        self.command = BatchCommand("resume", self.out, log=self.log, **self._how)

    def kill_command(self) -> None:
        self.command.kill()
        self.restart()

    def restart(self) -> None:
        """What an operator does when the command has ended."""
        if (self.out.parent / "out.jsonl.tramontane" / "batch.json").exists():
            self.resume()
        else:  # it ended before it recorded anything
            self.run()

    def until(self, num_lines: int, *, at_most_s: float | None = None) -> None:
        """Waits for this many answered lines, or for that time. Fails if the command ends earlier."""
        began = time.monotonic()

        def reached() -> bool:
            assert self.command.is_running, f"the command ended before {num_lines} lines were answered"
            is_late = at_most_s is not None and time.monotonic() - began >= at_most_s
            return is_late or self.num_done >= num_lines

        try:
            wait_until(reached, timeout_s=200, what=f"{num_lines} lines answered")
        except AssertionError as e:
            raise AssertionError(f"{e}; {self._state()}") from None

    def disturb(self, kills: Sequence[Kill], chance: random.Random) -> None:
        """Applies all kills before the batch ends, each after a random number of lines or seconds."""
        order = chance.sample(kills, len(kills))
        for num_left, kill in zip(range(len(order), 0, -1), order, strict=True):
            # As many lines as bring the last kill near the end, whatever was answered during the others.
            num_lines = max(0.0, LAST_KILL * len(self._reference.ids) - self.num_done) / num_left
            at_most_s = chance.uniform(0, MAX_PAUSE_S) if chance.random() < SOON else None
            self.until(self.num_done + round(chance.uniform(0, 2) * num_lines), at_most_s=at_most_s)
            time.sleep(chance.uniform(0, 0.1))
            assert self.command.is_running, f"the batch ended before all kills were made; {self._state()}"
            print(f"{time.monotonic() - self.began:7.1f} s  {self.num_done:5} lines  SIGKILL {kill.kind}", flush=True)
            kill.kill()
            self._deaths[kill.kind] += 1

    def check_end(self) -> None:
        """Waits for the end; checks that each line occurs once, with the answer of the undisturbed run. Prints the figures."""
        code = self.command.wait(END_TIMEOUT_S)
        expected = self._reference.answers
        written = sum(len(p.read_bytes().splitlines()) for p in (self.out, self.errors) if p.exists())
        found = answers(self.out, self.errors)
        differing = [i for i in expected if i in found and found[i] != expected[i]]
        figures = {
            "lines": written,
            "missing": len(expected.keys() - found.keys()),
            "duplicates": written - len(found),
            "differing": len(differing),
            "kills": dict(self._deaths),
            "seconds": round(time.monotonic() - self.began),
        }
        print(json.dumps(figures), flush=True)
        assert sorted(found) == sorted(self._reference.ids), "a line is missing or duplicated"
        assert not differing, f"{found[differing[0]]} instead of {expected[differing[0]]}; {self._state()}"
        assert code == 1, "the model rejects some lines, and the exit code says so"

    def _state(self) -> str:
        return f"{self.num_done} lines are answered; the log ends with:\n{self.log.read_text()[-3000:]}"


def kill_rank(processes: Callable[[], Sequence[psutil.Process]], chance: random.Random) -> None:
    """Kills one of the live ranks, or else the next one to start, at some moment of its start."""
    if not ranks_of(processes()):
        wait_until(lambda: bool(ranks_of(processes())), timeout_s=120, what="a rank to kill")
        time.sleep(chance.uniform(0, 1))
    found = ranks_of(processes())
    with contextlib.suppress(psutil.NoSuchProcess):
        if found:
            chance.choice(found).kill()
