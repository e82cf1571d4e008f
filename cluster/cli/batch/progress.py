"""The progress of a running batch as a person sees it: lines, failures, tokens per second, remaining time, replicas.

Knows snapshots of a batch, not where they come from. The bar and the lines are those of cluster/terminal.
"""

import itertools
import time
from collections import deque
from dataclasses import dataclass

from cluster.terminal.phases import Console

WINDOW_S = 30.0  # rates are averages over about this time
LINE_EVERY_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A batch at one moment. num_tokens: of prompts and answers so far. remaining: the estimated part of its work that is left, from 0 to
    1; None to go by lines. replicas: (ready, wanted), None if unknown.
    """

    status: str
    num_lines: int
    num_completed: int
    num_failed: int
    num_tokens: int
    remaining: float | None = None
    replicas: tuple[int, int] | None = None

    @property
    def num_answered(self) -> int:
        return self.num_completed + self.num_failed

    @property
    def fraction_left(self) -> float:
        """The part of the work that is left, from 0 to 1."""
        if self.num_lines == 0:
            return 1.0
        return 1 - self.num_answered / self.num_lines if self.remaining is None else self.remaining


class Meter:
    """Rates from a series of snapshots: `add` each. Times are time.monotonic()."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, Snapshot]] = deque()

    def add(self, snapshot: Snapshot, now: float) -> None:
        self._seen.append((now, snapshot))
        while len(self._seen) > 2 and now - self._seen[1][0] >= WINDOW_S:
            self._seen.popleft()

    @property
    def tokens_per_s(self) -> float | None:
        """None before the second snapshot."""
        (began, first), (ended, last) = self._seen[0], self._seen[-1]
        return (last.num_tokens - first.num_tokens) / (ended - began) if ended > began else None

    @property
    def left_s(self) -> float | None:
        """Seconds until all lines are answered, at the pace of the last half minute; None while the pace is unknown.

        A rejected line takes no time, however long it is. So intervals in which lines failed do not count for the pace by estimated work;
        if lines fail in all intervals, the pace is that of lines.
        """
        (began, first), (ended, last) = self._seen[0], self._seen[-1]
        by_lines = (last.num_answered - first.num_answered, ended - began, last.num_lines - last.num_answered)
        if last.remaining is None:
            return _time_for(*by_lines)
        clean = [
            (x.fraction_left - y.fraction_left, until - since)
            for (since, x), (until, y) in itertools.pairwise(self._seen)
            if x.num_failed == y.num_failed
        ]
        by_work = _time_for(sum(done for done, _ in clean), sum(took for _, took in clean), last.fraction_left)
        return _time_for(*by_lines) if by_work is None and last.num_failed > first.num_failed else by_work


def _time_for(done: float, took_s: float, left: float) -> float | None:
    return left * took_s / done if done > 0 else None


def describe(snapshot: Snapshot, meter: Meter) -> str:
    """A snapshot as one line of text."""
    words = [f"{snapshot.num_answered:,} of {snapshot.num_lines:,} lines"] if snapshot.num_lines else [snapshot.status]
    if snapshot.num_failed:
        words.append(f"{snapshot.num_failed:,} failed")
    if meter.tokens_per_s is not None:
        words.append(f"{meter.tokens_per_s:,.0f} tokens/s")
    if snapshot.num_lines and meter.left_s is not None and snapshot.fraction_left > 0:
        words.append(f"about {duration(meter.left_s)} left")
    if snapshot.replicas is not None:
        ready, wanted = snapshot.replicas
        words.append(f"{ready} of {wanted} replica{'s' * (wanted != 1)} ready" if wanted else "no replicas")
    if snapshot.num_lines and snapshot.status != "in_progress":
        words.append(snapshot.status)
    return ", ".join(words)


def duration(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {s:02} s" if minutes else f"{s} s"


class Display:
    """Call `show` with every new snapshot, and `close` at the end. A bar on a terminal; a line every ten seconds elsewhere."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console()
        self._bar = self._console.bar()
        self._meter = Meter()
        self._shown_at: float | None = None
        self._trouble: str | None = None

    def show(self, snapshot: Snapshot, now: float | None = None) -> None:
        """now: time.monotonic()."""
        now = time.monotonic() if now is None else now
        self._trouble = None
        self._meter.add(snapshot, now)
        text = describe(snapshot, self._meter)
        if self._console.is_terminal:
            self._bar.show(done=snapshot.num_answered, total=snapshot.num_lines or None, after=text)
        elif self._shown_at is None or now - self._shown_at >= LINE_EVERY_S:
            self._shown_at = now
            self._console.line(text)

    def trouble(self, message: str) -> None:
        """A temporary problem. Printed once, until the next `show`."""
        if message != self._trouble:
            self._trouble = message
            self._console.line(message)

    def close(self) -> None:
        """Idempotent."""
        self._bar.close()
