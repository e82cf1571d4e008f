"""The queue of sequences that wait at the router for room on a replica, ordered by priority, turn and arrival.

Knows order and counts. Knows no replica and no clock: the dispatcher decides when there is room, and what each sequence gets.
"""

import asyncio
import heapq
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

from cluster.router.stream import Stream

MAX_STALE = 64  # entries kept in the heap beyond twice the number that wait

T = TypeVar("T")  # what a sequence waits for


class Waiter(Generic[T]):
    """One queued sequence. Await `future` for its result."""

    __slots__ = ("future", "is_queued", "since", "stream")

    def __init__(self, stream: Stream, since: float) -> None:
        self.stream = stream
        self.since = since
        self.future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self.is_queued = True

    @property
    def is_waiting(self) -> bool:
        return self.is_queued and not self.future.done()  # cancelling the awaiting task cancels the future

    def __lt__(self, other: "Waiter[T]") -> bool:
        return self.stream.order < other.stream.order


class RequestQueue(Generic[T]):
    """`num_background`: how many of those that wait are batch lines, which come after all others.

    A sequence that leaves early stays in the heap until its turn comes or until too many are stale, so leaving is cheap.
    """

    def __init__(self) -> None:
        self._heap: list[Waiter[T]] = []
        self._num_waiting = 0
        self.num_background = 0

    def __len__(self) -> int:
        return self._num_waiting

    @property
    def num_online(self) -> int:
        """Waiting sequences that are not batch lines."""
        return self._num_waiting - self.num_background

    @property
    def num_stale(self) -> int:
        """Sequences that have left and are still held in memory."""
        return len(self._heap) - self._num_waiting

    def __iter__(self) -> Iterator[Waiter[T]]:
        """In no particular order. Sequences may leave during the iteration."""
        return (w for w in list(self._heap) if w.is_waiting)

    def join(self, stream: Stream, *, now: float) -> Waiter[T]:
        waiter: Waiter[T] = Waiter(stream, now)
        heapq.heappush(self._heap, waiter)
        self._num_waiting += 1
        self.num_background += stream.is_background
        return waiter

    def first(self) -> Waiter[T] | None:
        """The sequence whose turn it is."""
        while self._heap and not self._heap[0].is_waiting:
            heapq.heappop(self._heap)
        return self._heap[0] if self._heap else None

    def set_aside(self) -> Waiter[T]:
        """Takes the sequence whose turn it is out of the order until `put_back`. It still waits."""
        waiter = self.first()
        assert waiter is not None, "the queue is empty"
        return heapq.heappop(self._heap)

    def put_back(self, waiters: Iterable[Waiter[T]]) -> None:
        """Gives sequences that were set aside their places again."""
        for waiter in waiters:
            heapq.heappush(self._heap, waiter)

    def leave(self, waiter: Waiter[T]) -> None:
        """Takes the sequence out of the queue: served, failed, or no longer awaited. Idempotent."""
        if waiter.is_queued:
            waiter.is_queued = False
            self._num_waiting -= 1
            self.num_background -= waiter.stream.is_background
            if len(self._heap) > 2 * self._num_waiting + MAX_STALE:
                self._heap = [w for w in self._heap if w.is_queued]
                heapq.heapify(self._heap)

    def serve(self, waiter: Waiter[T], result: T) -> None:
        self.leave(waiter)
        waiter.future.set_result(result)

    def fail(self, waiter: Waiter[T], error: Exception) -> None:
        if waiter.is_waiting:
            self.leave(waiter)
            waiter.future.set_exception(error)

    def oldest_wait_s(self, now: float) -> float:
        """The longest wait so far, without batch lines."""
        return max((now - w.since for w in self if not w.stream.is_background), default=0.0)
