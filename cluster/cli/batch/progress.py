"""What a person sees of a running batch: lines, failures, tokens a second, the time that is left, replicas.

On a terminal a bar; elsewhere a line every ten seconds. Knows snapshots, whoever takes them; everything goes to stderr.
"""

import itertools
import sys
import time
from collections import deque
from dataclasses import dataclass
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

WINDOW_S = 30.0  # rates are means over about this long
LINE_EVERY_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A batch at one moment. `num_tokens`: of prompts and answers so far. `share_left`: of its work, estimated; None: by lines.

    `replicas`: those ready and those wanted, None where nobody says.
    """

    status: str
    num_lines: int
    num_completed: int
    num_failed: int
    num_tokens: int
    share_left: float | None = None
    replicas: tuple[int, int] | None = None

    @property
    def num_answered(self) -> int:
        return self.num_completed + self.num_failed

    @property
    def left(self) -> float:
        """Of 1."""
        if self.num_lines == 0:
            return 1.0
        return 1 - self.num_answered / self.num_lines if self.share_left is None else self.share_left


class Meter:
    """Rates of snapshots. `look` with each; times are time.monotonic()."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, Snapshot]] = deque()

    def look(self, snapshot: Snapshot, now: float) -> None:
        self._seen.append((now, snapshot))
        while len(self._seen) > 2 and now - self._seen[1][0] >= WINDOW_S:
            self._seen.popleft()

    @property
    def tokens_per_s(self) -> float | None:
        """None before a second look."""
        (began, first), (ended, last) = self._seen[0], self._seen[-1]
        return (last.num_tokens - first.num_tokens) / (ended - began) if ended > began else None

    @property
    def left_s(self) -> float | None:
        """Until all lines are answered, at the pace of the last half minute; None while there is no pace.

        A refused line takes no time, however long it is. So by the work that is left, what was seen while lines failed tells no pace; where
        they fail all the time, lines are counted.
        """
        (began, first), (ended, last) = self._seen[0], self._seen[-1]
        by_lines = (last.num_answered - first.num_answered, ended - began, last.num_lines - last.num_answered)
        if last.share_left is None:
            return _time_for(*by_lines)
        clean = [
            (x.left - y.left, until - since)
            for (since, x), (until, y) in itertools.pairwise(self._seen)
            if x.num_failed == y.num_failed
        ]
        by_work = _time_for(sum(done for done, _ in clean), sum(took for _, took in clean), last.left)
        return _time_for(*by_lines) if by_work is None and last.num_failed > first.num_failed else by_work


def _time_for(done: float, took_s: float, left: float) -> float | None:
    return left * took_s / done if done > 0 else None


def describe(snapshot: Snapshot, meter: Meter) -> str:
    """One line of text."""
    words = [f"{snapshot.num_answered:,} of {snapshot.num_lines:,} lines"] if snapshot.num_lines else [snapshot.status]
    if snapshot.num_failed:
        words.append(f"{snapshot.num_failed:,} failed")
    if meter.tokens_per_s is not None:
        words.append(f"{meter.tokens_per_s:,.0f} tokens/s")
    if snapshot.num_lines and meter.left_s is not None and snapshot.left > 0:
        words.append(f"about {duration(meter.left_s)} left")
    if snapshot.replicas is not None:
        ready, wanted = snapshot.replicas
        words.append(f"{ready} of {wanted} replica{'s' * (wanted != 1)} ready" if wanted else "no replica")
    if snapshot.num_lines and snapshot.status != "in_progress":
        words.append(snapshot.status)
    return ", ".join(words)


def duration(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {s:02} s" if minutes else f"{s} s"


class Display:
    """`show` as often as there is news, at last `close`."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._meter = Meter()
        self._shown_at: float | None = None
        self._trouble: str | None = None
        self._bar: Progress | None = None
        if self._stream.isatty():
            console = Console(file=self._stream, markup=False, highlight=False)
            self._bar = Progress(BarColumn(24), TextColumn("{task.description}", markup=False), console=console)
            self._task = self._bar.add_task("", total=None)
            self._bar.start()

    def show(self, snapshot: Snapshot, now: float | None = None) -> None:
        now = time.monotonic() if now is None else now
        self._trouble = None
        self._meter.look(snapshot, now)
        text = describe(snapshot, self._meter)
        if self._bar is not None:
            total = snapshot.num_lines or None
            self._bar.update(self._task, description=text, completed=snapshot.num_answered, total=total)
        elif self._shown_at is None or now - self._shown_at >= LINE_EVERY_S:
            self._shown_at = now
            self._line(text)

    def trouble(self, message: str) -> None:
        """Something that will pass by itself; said once until there is news again."""
        if message != self._trouble:
            self._trouble = message
            self._line(message)

    def close(self) -> None:
        """Idempotent."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _line(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text)
        else:
            self._stream.write(f"{text}\n")
            self._stream.flush()
