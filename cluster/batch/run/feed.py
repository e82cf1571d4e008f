"""The feed of a batch: the lines that are still to run, in their order, with their bodies.

Reads ahead from the store and the input file, a bounded number of bytes. Does not run the lines (window.py).
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from cluster.batch.files import FileContents
from cluster.batch.lines import body_of
from cluster.batch.records import BatchRecord, Line
from cluster.batch.store.interface import Store

PAGE_LINES = 1000
AHEAD_BYTES = 8 * 1024 * 1024


class Work(NamedTuple):
    """A line and its body, ready to run."""

    line: Line
    body: bytes


class Feed:
    """`pop` lines as they become ready; `on_ready` is called when there are more.

    Raises StoreError when the store or the input file cannot be read.
    """

    def __init__(self, store: Store, files: FileContents, batch: BatchRecord) -> None:
        self._store = store
        self._files = files
        self._batch = batch
        self._ready: deque[Work] = deque()
        self._lines: deque[Line] = deque()  # of the current page, bodies not read yet
        self._position = 0
        self._is_exhausted = False
        self._reading: asyncio.Task[None] | None = None
        self.on_ready: Callable[[], None] = lambda: None

    @property
    def is_empty(self) -> bool:
        """True once no lines are left, now or later. Only known after a `pop` that returned None."""
        return self._is_exhausted and not self._ready and not self._lines

    def pop(self) -> Work | None:
        """The next line, or None while it has not been read yet."""
        if len(self._ready) < PAGE_LINES // 2:
            self._read_ahead()
        return self._ready.popleft() if self._ready else None

    async def close(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            with contextlib.suppress(
                asyncio.CancelledError, Exception
            ):  # `pop` has reported it, or nothing needs it now
                await self._reading

    async def work_for(self, line: Line) -> Work:
        """Reads the body of a line out of order."""
        return (await self._bodies([line]))[0]

    def _read_ahead(self) -> None:
        if self._reading is not None and self._reading.done():
            self._reading.result()
            self._reading = None
        if self._reading is None and not (self._is_exhausted and not self._lines):
            self._reading = asyncio.create_task(self._read())
            self._reading.add_done_callback(lambda _: self.on_ready())

    async def _read(self) -> None:
        if not self._lines:
            page = await self._store.pending_lines(self._batch.id, after=self._position, limit=PAGE_LINES)
            self._lines.extend(page)
            if not page:
                self._is_exhausted = True
                return
            self._position = page[-1].position
        part: list[Line] = []
        num_bytes = 0
        while self._lines and (not part or num_bytes + self._lines[0].num_bytes <= AHEAD_BYTES):
            line = self._lines.popleft()
            part.append(line)
            num_bytes += line.num_bytes
        self._ready.extend(await self._bodies(part))

    async def _bodies(self, lines: list[Line]) -> list[Work]:
        parts = [(line.offset, line.num_bytes) for line in lines]
        data = await self._files.read_parts(self._batch.input_file_id, parts)
        return [Work(line, body_of(text)) for line, text in zip(lines, data, strict=True)]
