"""The interface between the store's SQL and a database: transactions in a thread, rows as tuples, `?` for a parameter.

Knows the schema, which is the same for both databases except for three types. Does not know either database (sqlite.py, postgres.py).
"""

from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any, Protocol, TypeVar

from cluster.batch.errors import StoreError

T = TypeVar("T")
Row = tuple[Any, ...]

# Entry i takes a database from version i to i + 1. {key}: an auto-incremented key; {bytes}: the type of a blob; {clustered}: for tables
# that are stored in the order of their primary key.
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
    (
        """CREATE TABLE responses (
            seq {key}, id TEXT NOT NULL UNIQUE, owner TEXT NOT NULL, status TEXT NOT NULL, expires_at BIGINT NOT NULL,
            record {bytes} NOT NULL,
            lease_owner TEXT, lease_fence BIGINT NOT NULL, lease_expires_at DOUBLE PRECISION NOT NULL
        )""",
        "CREATE INDEX responses_running ON responses (seq) WHERE status IN ('queued', 'in_progress')",
        "CREATE INDEX responses_by_expiry ON responses (expires_at)",
        # Apart from the records, which are written more than once: a request may be large.
        "CREATE TABLE response_requests (response BIGINT NOT NULL PRIMARY KEY, data {bytes} NOT NULL)",
        """CREATE TABLE response_steps (
            response BIGINT NOT NULL, number BIGINT NOT NULL, data {bytes} NOT NULL, PRIMARY KEY (response, number)
        ){clustered}""",
    ),
)


def newer_schema_error(what: str, version: int, *, remedy: str) -> StoreError:
    known = len(MIGRATIONS)
    return StoreError(f"{what} was made by a newer release (schema {version}, this one knows {known}).", remedy=remedy)


class Session(Protocol):
    """One open transaction, in a thread. `lock`: the suffix of a SELECT that keeps others from changing its rows."""

    lock: str

    def execute(self, sql: str, parameters: Sequence[Any] = ()) -> list[Row]:
        """Returns the rows, if any."""

    def execute_many(self, sql: str, rows: Sequence[Sequence[Any]]) -> None: ...

    def clock(self, now: float) -> float:
        """The time on which all users of the database agree: the server's clock, or `now` where all are on one host."""


class Database(Protocol):
    """Every method raises StoreError when the database fails; nothing of the transaction is kept then."""

    async def write(self, work: Callable[[Session], T]) -> T:
        """Runs `work` in a transaction. May run it again after a lost connection, so `work` must have no other effect."""

    async def read(self, work: Callable[[Session], T]) -> T:
        """The same for work that changes nothing. Does not wait for writers."""

    def stream(self, sql: str, parameters: Sequence[Any] = (), *, num_rows: int) -> AsyncGenerator[list[Row], None]:
        """The rows of one SELECT, `num_rows` at a time, as they were at one moment. Others may write at the same time."""

    async def close(self) -> None:
        """Idempotent."""
