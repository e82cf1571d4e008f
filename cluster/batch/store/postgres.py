"""The store in a PostgreSQL database, for gateways on several hosts. Knows psycopg; the SQL is in sql_store.py.

One connection writes and one reads, each in a thread of its own. They connect when first used, and again after a lost connection: a
transaction that could not even begin is run once more. Rows are locked with SELECT ... FOR UPDATE. Lease times use the server's clock,
because the hosts' clocks may differ.
"""

from collections.abc import AsyncGenerator, Callable, Sequence
from functools import partial
from typing import Any, LiteralString

import psycopg

from cluster.batch.errors import NOTHING_LOST, StoreError
from cluster.batch.store.connection_thread import ConnectionThread
from cluster.batch.store.database import MIGRATIONS, Row, T, newer_schema_error
from cluster.batch.store.sql_store import SqlStore

CONNECT_TIMEOUT_S = 10
STATEMENT_TIMEOUT_MS = 300_000
_LOCK_KEY = 0x7472616D  # of the advisory lock that guards schema migrations


def open_postgres(url: str) -> SqlStore:
    """Creates the tables if necessary. Raises StoreError for a server that cannot be reached, or the schema of a newer release."""
    try:
        with _connect(url) as connection:
            _migrate(connection)
    except psycopg.Error as e:
        raise StoreError(f"The batch database cannot be opened: {_sentence(e)}") from e
    return SqlStore(_Database(url))


class _Session:
    lock = " FOR UPDATE"

    def __init__(self, connection: "psycopg.Connection[Row]") -> None:
        self._cursor = connection.cursor()

    def execute(self, sql: str, parameters: Sequence[Any] = ()) -> list[Row]:
        self._cursor.execute(_translate(sql), parameters)
        return self._cursor.fetchall() if self._cursor.description is not None else []

    def execute_many(self, sql: str, rows: Sequence[Sequence[Any]]) -> None:
        self._cursor.executemany(_translate(sql), rows)

    def clock(self, now: float) -> float:
        return float(self.execute("SELECT EXTRACT(EPOCH FROM CLOCK_TIMESTAMP())")[0][0])


class _Database:
    def __init__(self, url: str) -> None:
        self._connect = partial(_connect, url)
        self._writing = _Thread("batch-writer", self._connect)
        self._reading = _Thread("batch-reader", self._connect)

    async def write(self, work: Callable[[_Session], T]) -> T:
        return await self._writing.transact(lambda connection: work(_Session(connection)))

    async def read(self, work: Callable[[_Session], T]) -> T:
        return await self._reading.transact(lambda connection: work(_Session(connection)))

    async def stream(
        self, sql: str, parameters: Sequence[Any] = (), *, num_rows: int
    ) -> AsyncGenerator[list[Row], None]:
        thread = _Thread("batch-stream", self._connect)
        try:
            cursor = await thread.run(lambda connection: _open_cursor(connection, sql, parameters))
            while rows := await thread.run(lambda _: cursor.fetchmany(num_rows)):
                yield rows
        finally:
            await thread.close()

    async def close(self) -> None:
        await self._writing.close()
        await self._reading.close()


class _Thread(ConnectionThread["psycopg.Connection[Row]"]):
    """`run` leaves transactions to `work`; `transact` opens one for it."""

    _has_begun = False

    async def transact(self, work: "Callable[[psycopg.Connection[Row]], T]") -> T:
        """Runs `work` in a transaction of its own."""

        def transaction(connection: "psycopg.Connection[Row]") -> T:
            with connection.transaction():
                self._has_begun = True
                return work(connection)

        return await self.run(transaction)

    def _attempt(self, work: "Callable[[psycopg.Connection[Row]], T]") -> T:
        for is_last in (False, True):
            self._has_begun = False
            try:
                return work(self._connected())
            except psycopg.Error as e:
                was_stale = self._connection is not None and self._connection.closed and not self._has_begun
                self._disconnect()
                if is_last or not was_stale:
                    raise StoreError(
                        f"The batch database cannot be read or written: {_sentence(e)}", remedy=NOTHING_LOST
                    ) from e
        raise AssertionError("the last try returns or raises")

    def _connected(self) -> "psycopg.Connection[Row]":
        if self._connection is not None and self._connection.closed:
            self._connection = None
        return super()._connected()


def _connect(url: str) -> "psycopg.Connection[Row]":
    return psycopg.connect(
        url,
        autocommit=True,  # transactions are opened explicitly
        connect_timeout=CONNECT_TIMEOUT_S,
        application_name="tramontane-batches",
        options=f"-c statement_timeout={STATEMENT_TIMEOUT_MS}",
        keepalives_idle=10,
        keepalives_interval=5,
        keepalives_count=3,
    )


def _open_cursor(
    connection: "psycopg.Connection[Row]", sql: str, parameters: Sequence[Any]
) -> "psycopg.ServerCursor[Row]":
    connection.autocommit = False
    cursor = connection.cursor(name="stream")
    cursor.execute(_translate(sql), parameters)
    return cursor


def _migrate(connection: "psycopg.Connection[Row]") -> None:
    with connection.transaction():
        connection.execute("SELECT pg_advisory_xact_lock(%s)", (_LOCK_KEY,))
        connection.execute("CREATE TABLE IF NOT EXISTS batch_schema (version INTEGER NOT NULL)")
        found = connection.execute("SELECT version FROM batch_schema").fetchone()
        version = found[0] if found else 0
        if version > len(MIGRATIONS):
            raise newer_schema_error("The batch database", version, remedy="Run that release, or use another database.")
        for migration in MIGRATIONS[version:]:
            for statement in migration:
                key = "BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY"
                connection.execute(_literal(statement.format(key=key, bytes="BYTEA", clustered="")))
        connection.execute("DELETE FROM batch_schema")
        connection.execute("INSERT INTO batch_schema VALUES (%s)", (len(MIGRATIONS),))


def _translate(sql: str) -> LiteralString:
    """In the store's SQL, question marks and percent signs only stand for parameters."""
    return _literal(sql.replace("?", "%s"))


def _literal(sql: str) -> LiteralString:
    """psycopg's types only accept literals, to prevent values pasted into SQL. These statements come from literals in this package."""
    return sql  # type: ignore[return-value]


def _sentence(error: psycopg.Error) -> str:
    """The first line of the server's message; the rest names queries and hosts."""
    text = str(error).strip().splitlines()
    return f"{text[0].rstrip('.') if text else type(error).__name__}."
