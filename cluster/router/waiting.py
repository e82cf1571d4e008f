"""Sequences that wait at the router for room on a replica: in order of priority, then arrival.

Knows order and counts. Knows no replica and no clock: whoever owns the line decides when there is room, and what is handed out.
"""

import asyncio
import heapq
from collections.abc import Iterator
from typing import Generic, TypeVar

from cluster.router.stream import Stream

MAX_LEFT = 64  # kept beside as many as wait

P = TypeVar("P")  # what a sequence waits for


class Waiter(Generic[P]):
    """One sequence in line. Await `future` for its place."""

    __slots__ = ("future", "in_line", "since", "stream")

    def __init__(self, stream: Stream, since: float) -> None:
        self.stream = stream
        self.since = since
        self.future: asyncio.Future[P] = asyncio.get_running_loop().create_future()
        self.in_line = True

    @property
    def is_waiting(self) -> bool:
        return self.in_line and not self.future.done()  # cancelling who awaits cancels the future

    def __lt__(self, other: "Waiter[P]") -> bool:
        return self.stream.order < other.stream.order


class WaitingLine(Generic[P]):
    """`num_background`: batch lines among those that wait, behind all others.

    Whoever leaves early is skipped when its turn comes, or swept out when many have, so that leaving costs next to nothing.
    """

    def __init__(self) -> None:
        self._heap: list[Waiter[P]] = []
        self._num_waiting = 0
        self.num_background = 0

    def __len__(self) -> int:
        return self._num_waiting

    def __iter__(self) -> Iterator[Waiter[P]]:
        """In no order; whoever is taken out meanwhile does no harm."""
        return (w for w in list(self._heap) if w.is_waiting)

    def join(self, stream: Stream, *, now: float) -> Waiter[P]:
        waiter: Waiter[P] = Waiter(stream, now)
        heapq.heappush(self._heap, waiter)
        self._num_waiting += 1
        self.num_background += stream.is_background
        return waiter

    def first(self) -> Waiter[P] | None:
        """Whose turn it is."""
        while self._heap and not self._heap[0].is_waiting:
            heapq.heappop(self._heap)
        return self._heap[0] if self._heap else None

    def leave(self, waiter: Waiter[P]) -> None:
        """With a place, with an error, or because nobody awaits it any more. Idempotent."""
        if waiter.in_line:
            waiter.in_line = False
            self._num_waiting -= 1
            self.num_background -= waiter.stream.is_background
            if len(self._heap) > 2 * self._num_waiting + MAX_LEFT:
                self._heap = [w for w in self._heap if w.in_line]
                heapq.heapify(self._heap)

    def serve(self, waiter: Waiter[P], place: P) -> None:
        self.leave(waiter)
        waiter.future.set_result(place)

    def fail(self, waiter: Waiter[P], error: Exception) -> None:
        if waiter.is_waiting:
            self.leave(waiter)
            waiter.future.set_exception(error)

    def oldest_wait_s(self, now: float) -> float:
        """Of those that are no background work."""
        return max((now - w.since for w in self if not w.stream.is_background), default=0.0)
