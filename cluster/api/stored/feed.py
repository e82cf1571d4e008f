"""What is stored so far of a response that runs in this gateway, for those who read along. Knows no database and no HTTP.

Readers wait here instead of asking the store again and again. The steps are kept encoded: a response of 4,000 tokens takes 100 KB.
"""

import asyncio
from bisect import bisect_right
from collections.abc import Sequence

from cluster.responses.records import ResponseRecord, Step, decode_steps, encode_steps


class Feed:
    """`record` is set when the response has ended; `is_cut` when it no longer runs here, and `error` says why, if that is known.

    `num_readers`: clients that wait here; `num_live`: of them, those that want each step at once.
    """

    def __init__(self, steps: Sequence[Step] = ()) -> None:
        self._chunks: list[bytes] = []
        self._starts: list[int] = []  # the number of each chunk's first step
        self.num_steps = 0
        self.num_readers = 0
        self.num_live = 0
        self.record: ResponseRecord | None = None
        self.error: Exception | None = None
        self.is_cut = False
        self._changed = asyncio.Event()
        if steps:
            self.push(encode_steps(list(steps)), len(steps))

    def push(self, data: bytes, num_steps: int) -> None:
        """These steps are stored."""
        self._chunks.append(data)
        self._starts.append(self.num_steps)
        self.num_steps += num_steps
        self._notify()

    def end(self, record: ResponseRecord) -> None:
        """The response has ended, and its record is stored."""
        self.record = record
        self._notify()

    def cut(self, error: Exception | None = None) -> None:
        """Nothing more comes from here."""
        self.is_cut, self.error = True, error
        self._notify()

    def since(self, number: int) -> list[Step]:
        """The steps from this number on."""
        first = max(0, bisect_right(self._starts, number) - 1)
        steps = [step for data in self._chunks[first:] for step in decode_steps(data)]
        return steps[number - self._starts[first] :] if steps else []

    async def wait(self, number: int) -> None:
        """Returns when there is a step with this number, or when none will come."""
        while self.num_steps <= number and self.record is None and not self.is_cut:
            await self._changed.wait()

    def _notify(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
