"""The seam between the store's SQL and a database: transactions in a thread, rows as tuples. SQL is written with `?` for a parameter.

Knows neither what is stored nor where (sqlite_store.py, postgres_store.py). The schema is here for both: they agree but for two types.
"""

from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any, Protocol, TypeVar

T = TypeVar("T")
Row = tuple[Any, ...]

# Each entry brings a database from version i to i + 1. {key}: a column that counts up by itself; {bytes}: the type of a blob.
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE files (
            seq {key}, id TEXT NOT NULL UNIQUE, owner TEXT NOT NULL, purpose TEXT NOT NULL, expires_at BIGINT, record {bytes} NOT NULL
        )""",
        """CREATE TABLE batches (
            seq {key}, id TEXT NOT NULL UNIQUE, owner TEXT NOT NULL, status TEXT NOT NULL, input_file_id TEXT NOT NULL,
            record {bytes} NOT NULL,
            lease_owner TEXT, lease_fence BIGINT NOT NULL DEFAULT 0, lease_expires_at DOUBLE PRECISION NOT NULL DEFAULT 0
        )""",
        "CREATE INDEX batches_by_status ON batches (status, seq)",
        """CREATE TABLE lines (
            batch BIGINT NOT NULL, number BIGINT NOT NULL, custom_id TEXT NOT NULL, start BIGINT NOT NULL, num_bytes BIGINT NOT NULL,
            group_key BIGINT NOT NULL, num_tokens BIGINT NOT NULL, length_class INTEGER NOT NULL, crashes INTEGER NOT NULL,
            PRIMARY KEY (batch, number)
        ){clustered}""",
        "CREATE INDEX lines_suspect ON lines (batch) WHERE crashes > 0",
        """CREATE TABLE line_order (
            batch BIGINT NOT NULL, position BIGINT NOT NULL, number BIGINT NOT NULL, PRIMARY KEY (batch, position)
        ){clustered}""",
        """CREATE TABLE results (
            batch BIGINT NOT NULL, number BIGINT NOT NULL, status_code INTEGER, request_id TEXT NOT NULL,
            error_code TEXT, error_message TEXT,
            num_prompt_tokens BIGINT NOT NULL, num_cached_tokens BIGINT NOT NULL, num_output_tokens BIGINT NOT NULL, body {bytes} NOT NULL,
            PRIMARY KEY (batch, number)
        )""",
    ),
    ("ALTER TABLE lines ADD COLUMN lone_crashes INTEGER NOT NULL DEFAULT 0",),
)


class Session(Protocol):
    """Inside one transaction, in a thread. `lock`: what a SELECT ends with to keep others from changing its rows."""

    lock: str

    def execute(self, sql: str, parameters: Sequence[Any] = ()) -> list[Row]:
        """The rows, if it gives any."""

    def execute_many(self, sql: str, rows: Sequence[Sequence[Any]]) -> None: ...

    def clock(self, now: float) -> float:
        """The time that all who share the database agree on: its own, or `now` where all are on one host."""


class Database(Protocol):
    """Every method raises StoreError when the database cannot do it; then nothing of the transaction is kept."""

    async def write(self, work: Callable[[Session], T]) -> T:
        """Runs `work` in a transaction. It may be run again when the connection was lost, so it must have no other effect."""

    async def read(self, work: Callable[[Session], T]) -> T:
        """The same for work that changes nothing; it does not wait for writers."""

    def stream(self, sql: str, parameters: Sequence[Any] = (), *, num_rows: int) -> AsyncGenerator[list[Row], None]:
        """The rows of one SELECT, all of one moment, so many at a time. Others may write meanwhile."""

    async def close(self) -> None:
        """Idempotent."""
