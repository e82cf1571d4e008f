"""The store in an SQLite file of the data directory: the default, for one host. Several processes of the host may share it.

Uses a write-ahead log, so that readers do not wait for writers. A transaction is on disk when its method returns (synchronous=FULL). One
thread writes and one reads: SQLite allows one writer at a time anyway. The SQL is in sql_store.py.
"""

import sqlite3
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from cluster.batch.errors import NOTHING_LOST, StoreError
from cluster.batch.store.connection_thread import ConnectionThread
from cluster.batch.store.database import MIGRATIONS, Row, T, newer_schema_error
from cluster.batch.store.sql_store import SqlStore

BUSY_TIMEOUT_S = 20.0  # another process may be storing many lines
CACHE_KIB = 4 * 1024  # per connection; the operating system caches the file as well
# Fewer, longer checkpoints: the pages of an index that is filled in random order are then written once for many changes.
CHECKPOINT_PAGES = 8000


def open_sqlite(path: Path) -> SqlStore:
    """Creates the file if necessary. Raises StoreError for a file that cannot be used, or that a newer release wrote."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)  # otherwise SQLite creates it with the umask's mode
        with closing(_connect(path)) as connection:
            _migrate(connection)
    except (sqlite3.Error, OSError) as e:
        raise StoreError(
            f"The batch store {path} cannot be opened: {e}.",
            remedy="Check that its folder is writable and has free space.",
        ) from e
    return SqlStore(_Database(path))


class _Session:
    lock = ""  # a writing transaction locks the database (BEGIN IMMEDIATE)

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def execute(self, sql: str, parameters: Sequence[Any] = ()) -> list[Row]:
        return self._connection.execute(sql, parameters).fetchall()

    def execute_many(self, sql: str, rows: Sequence[Sequence[Any]]) -> None:
        self._connection.executemany(sql, rows)

    def clock(self, now: float) -> float:
        return now


class _Database:
    def __init__(self, path: Path) -> None:
        self._connect = partial(_connect, path)
        self._writing = _Thread("batch-writer", self._connect)
        self._reading = _Thread("batch-reader", self._connect)

    async def write(self, work: Callable[[_Session], T]) -> T:
        def transaction(connection: sqlite3.Connection) -> T:
            connection.execute("BEGIN IMMEDIATE")
            try:
                result = work(_Session(connection))
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:  # SQLite rolls back by itself after some errors, such as a full disk
                    connection.execute("ROLLBACK")
                raise
            return result

        return await self._writing.run(transaction)

    async def read(self, work: Callable[[_Session], T]) -> T:
        def transaction(connection: sqlite3.Connection) -> T:
            connection.execute("BEGIN")
            try:
                return work(_Session(connection))
            finally:
                connection.execute("ROLLBACK")

        return await self._reading.run(transaction)

    async def stream(
        self, sql: str, parameters: Sequence[Any] = (), *, num_rows: int
    ) -> AsyncGenerator[list[Row], None]:
        thread = _Thread("batch-stream", self._connect)  # a separate one: the cursor stays open while others read
        try:
            cursor = await thread.run(lambda connection: connection.execute(sql, parameters))
            while rows := await thread.run(lambda _: cursor.fetchmany(num_rows)):
                yield rows
        finally:
            await thread.close()

    async def close(self) -> None:
        await self._writing.close()
        await self._reading.close()


class _Thread(ConnectionThread[sqlite3.Connection]):
    def _attempt(self, work: Callable[[sqlite3.Connection], T]) -> T:
        try:
            return work(self._connected())
        except sqlite3.Error as e:
            self._disconnect()  # its state is unknown, so the next call starts with a new one
            raise StoreError(f"The batch store cannot be read or written: {e}.", remedy=NOTHING_LOST) from e


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
    try:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute(f"PRAGMA cache_size=-{CACHE_KIB}")
        connection.execute(f"PRAGMA wal_autocheckpoint={CHECKPOINT_PAGES}")
        connection.execute("PRAGMA journal_size_limit=67108864")
    except BaseException:
        connection.close()
        raise
    return connection


def _migrate(connection: sqlite3.Connection) -> None:
    connection.execute("BEGIN IMMEDIATE")
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > len(MIGRATIONS):
        raise newer_schema_error("The batch store", version, remedy="Run that release, or use another data directory.")
    for migration in MIGRATIONS[version:]:
        for statement in migration:
            connection.execute(statement.format(key="INTEGER PRIMARY KEY", bytes="BLOB", clustered=" WITHOUT ROWID"))
    if version < len(MIGRATIONS):  # an up-to-date store is not written to, so that it opens on a full disk too
        connection.execute(f"PRAGMA user_version={len(MIGRATIONS)}")
    connection.execute("COMMIT")
