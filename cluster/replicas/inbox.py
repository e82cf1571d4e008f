"""What one stream's reader has not read yet, and when the reader lags too much. Pure: the time is an argument, in seconds.

Knows deltas and roughly how much memory they take; knows no sockets.
"""

import asyncio
from collections import deque
from collections.abc import Callable

from workers.errors import RequestError
from workers.protocol import TokenDelta

MAX_LAG_BYTES = 4 * 2**20  # about 10,000 plain deltas: more than a model makes while a writer waits for its client
LAG_PATIENCE_S = 5.0  # a burst, for example after this process stood still, is not the reader's fault


class StreamInbox:
    """A queue of deltas with one reader. Its end is an error that `get` raises. asyncio's own queue costs three times as much.

    take: see Replica.generate. It is asked while the reader waits, so it has all the deltas before.
    """

    __slots__ = ("_items", "_lags_since", "_loop", "_num_bytes", "_reader", "_take")

    def __init__(self, take: Callable[[TokenDelta], bool] | None = None) -> None:
        self._items: deque[TokenDelta | Exception] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None  # to ask for it is a system call
        self._take = take
        self._reader: asyncio.Future[None] | None = None  # while it waits
        self._num_bytes = 0
        self._lags_since: float | None = None

    def __len__(self) -> int:
        """How many deltas and errors wait."""
        return len(self._items)

    def put(self, delta: TokenDelta, now: float) -> bool:
        """False when the reader has lagged more than MAX_LAG_BYTES for LAG_PATIENCE_S: an error replaces everything that waited."""
        if self._take is not None and self._reader is not None and not self._items and not self._reader.done():
            try:
                if self._take(delta):
                    return True
            except Exception as e:  # the reader's to handle
                self._put(e)
                return True
        self._num_bytes += _size_of(delta)
        if self._num_bytes > MAX_LAG_BYTES and self._items:
            self._lags_since = self._lags_since or now
        if self._lags_since is not None and now - self._lags_since > LAG_PATIENCE_S:
            self._items.clear()
            self.end(
                RequestError(
                    "The client reads this stream more slowly than it is generated.",
                    remedy="Read faster.",
                    code="slow_reader",
                )
            )
            return False
        self._put(delta)
        return True

    def end(self, error: Exception) -> None:
        self._put(error)

    def _put(self, item: TokenDelta | Exception) -> None:
        self._items.append(item)
        reader = self._reader
        if reader is not None and not reader.done():
            reader.set_result(None)

    async def get(self) -> TokenDelta:
        """The next delta. Raises the error that the stream ended with. A canceled call takes nothing."""
        while not self._items:
            if self._loop is None:
                self._loop = asyncio.get_running_loop()
            self._reader = self._loop.create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        item = self._items.popleft()
        if isinstance(item, Exception):
            raise item
        self._num_bytes -= _size_of(item)
        if self._num_bytes <= MAX_LAG_BYTES:
            self._lags_since = None
        return item


def _size_of(delta: TokenDelta) -> int:
    """In bytes, roughly; log-probabilities are what can make it large."""
    size = 400 + 36 * len(delta.token_ids)
    for entries in (delta.logprobs, delta.prompt_logprobs):
        if entries:
            size += sum(200 + 100 * len(entry.top) for entry in entries if entry is not None)
    return size
