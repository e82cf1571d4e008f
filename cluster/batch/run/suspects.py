"""Suspects: lines that were running when a replica died. Decides in what group each runs next, and when it is given up.

Any of the lines on a dead replica may have killed it, or none. Each crash makes the group smaller in which a line is retried, until it
runs alone; only crashes of replicas that worked on nothing else prove that the line is the cause. A line that merely ran next to the
cause, or on a replica that was killed from outside, is answered in one of the retries. Pure: knows no store, no task and no clock.
"""

import heapq
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cluster.batch.records import Line

# Groups shrink by a factor of eight: of 500 lines the cause is alone after three crashes, and the others wait only a few rounds.
SHRINK_BITS = 3


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How many crashes a line may cause before it is given up.

    max_lone_crashes: of replicas that worked on nothing else. max_crashes: in total, for a line that never runs alone because other
    requests keep the replicas busy.
    """

    max_lone_crashes: int = 2
    max_crashes: int = 8

    def verdict(self, line: Line) -> str | None:
        """Why the line is given up, as the start of a message; None while it is not."""
        if line.lone_crashes >= self.max_lone_crashes:
            return f"{line.lone_crashes} replicas ended while they worked on this request and nothing else"
        if line.crashes >= self.max_crashes:
            return f"{line.crashes} replicas ended while they worked on this request"
        return None


def max_group_size(line: Line, capacity: int) -> int:
    """How many lines may run at once, this one included, while this suspect runs. capacity: the limit for lines without crashes.

    With a capacity of 256: 32 after one crash, 4 after two, then 1.
    """
    return 1 if line.lone_crashes else max(1, capacity >> (SHRINK_BITS * line.crashes))


class Suspects:
    """The suspects that wait to be retried. Largest group first, so that the many harmless lines are answered soon."""

    def __init__(self, lines: Iterable[Line] = ()) -> None:
        self._count = itertools.count()
        self._heap: list[tuple[int, int, int, Line]] = []
        for line in lines:
            self.add(line)

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, line: Line) -> None:
        """Queues the line after those with the same number of crashes."""
        heapq.heappush(self._heap, (line.lone_crashes, line.crashes, next(self._count), line))

    def pop(self, in_flight: Sequence[Line], capacity: int) -> Line | None:
        """The next suspect that may run together with those in flight (suspects too), or None."""
        if not self._heap or capacity <= 0:
            return None
        line = self._heap[0][-1]
        if len(in_flight) >= min(max_group_size(x, capacity) for x in (line, *in_flight)):
            return None
        return heapq.heappop(self._heap)[-1]


class Trials:
    """Lets one batch at a time retry its suspects. Batches that share replicas share it; otherwise their suspects would incriminate
    each other.
    """

    def __init__(self) -> None:
        self._current: object | None = None

    def begin(self, owner: object) -> bool:
        """Returns whether it is this owner's turn, which lasts until its `end`."""
        if self._current is None:
            self._current = owner
        return self._current is owner

    def end(self, owner: object) -> None:
        """Does nothing if it is another owner's turn."""
        if self._current is owner:
            self._current = None
