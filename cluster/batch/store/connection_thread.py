"""One thread with one connection to a database, on which the asyncio side of both stores runs its work.

Knows neither database: its subclasses know how to connect and what each error means.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, Protocol, TypeVar

from cluster.batch.errors import StoreError
from cluster.batch.store.database import T


class _Closable(Protocol):
    def close(self) -> None: ...


ConnectionT = TypeVar("ConnectionT", bound=_Closable)


class ConnectionThread(Generic[ConnectionT]):
    """Connects with the first `run`, and again with the next `run` after a failure."""

    def __init__(self, name: str, connect: Callable[[], ConnectionT]) -> None:
        self._connect = connect
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._connection: ConnectionT | None = None
        self._closed = False

    async def run(self, work: Callable[[ConnectionT], T]) -> T:
        """Runs `work` with the connection. Raises StoreError when the database fails, or after `close`."""
        if self._closed:
            raise StoreError("The batch store is closed.")
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._attempt, work)

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        await asyncio.get_running_loop().run_in_executor(self._pool, self._disconnect)
        self._pool.shutdown()

    def _attempt(self, work: Callable[[ConnectionT], T]) -> T:
        """Runs in the thread: calls `work` with `_connected()` and turns the database's errors into StoreError."""
        raise NotImplementedError

    def _connected(self) -> ConnectionT:
        if self._connection is None:
            self._connection = self._connect()
        return self._connection

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
