"""Lines that were under way as a replica died: in what company each of them runs next, and when one is given up.

Any of the lines on a dead replica may have killed it, or none. So each crash makes the company smaller in which a line is tried again,
until it runs alone; only crashes of replicas that worked on nothing else prove its guilt. A line that others brought into trouble, or
that was on replicas killed from outside, is answered in one of the trials. Pure: knows no store, no task and no clock.
"""

import heapq
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cluster.batch.records import Line

SHRINK_BITS = (
    3  # by eight: of 500 lines the guilty one is alone after three crashes, and the innocent wait for few rounds
)


@dataclass(frozen=True, kw_only=True)
class Patience:
    """`max_lone_crashes`: replicas that may die of a line while they work on nothing else. `max_crashes`: in all, for a line that is
    never alone, because other requests keep the replicas busy.
    """

    max_lone_crashes: int = 2
    max_crashes: int = 8

    def verdict(self, line: Line) -> str | None:
        """Why the line is given up, as the beginning of a sentence; None while it is not."""
        if line.lone_crashes >= self.max_lone_crashes:
            return f"{line.lone_crashes} replicas ended while they worked on this request and nothing else"
        if line.crashes >= self.max_crashes:
            return f"{line.crashes} replicas ended while they worked on this request"
        return None


def max_company(line: Line, room: int) -> int:
    """How many lines may be under way at most, itself included, while this one is. `room`: for lines that are no suspects.

    Of 256 lines: 32 after one crash, 4 after two, then alone.
    """
    return 1 if line.lone_crashes else max(1, room >> (SHRINK_BITS * line.crashes))


class Suspects:
    """Those that wait. Largest company first, so that the many innocent are answered soon; the most suspect ones last."""

    def __init__(self, lines: Iterable[Line] = ()) -> None:
        self._count = itertools.count()
        self._heap: list[tuple[int, int, int, Line]] = []
        for line in lines:
            self.add(line)

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, line: Line) -> None:
        """Behind those that are as suspect."""
        heapq.heappush(self._heap, (line.lone_crashes, line.crashes, next(self._count), line))

    def take(self, under_way: Sequence[Line], room: int) -> Line | None:
        """The next one that may run beside these, which are suspects too."""
        if not self._heap or room <= 0:
            return None
        line = self._heap[0][-1]
        if len(under_way) >= min(max_company(x, room) for x in (line, *under_way)):
            return None
        return heapq.heappop(self._heap)[-1]


class Trials:
    """Shared by the batches that run on the same replicas: one at a time tries its suspects, which would else accuse each other's."""

    def __init__(self) -> None:
        self._holder: object | None = None

    def begin(self, who: object) -> bool:
        """Whether it is this one's turn, which lasts until its `end`."""
        if self._holder is None:
            self._holder = who
        return self._holder is who

    def end(self, who: object) -> None:
        """Harmless for whoever has not begun."""
        if self._holder is who:
            self._holder = None
