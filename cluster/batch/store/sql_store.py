"""The Store in SQL, the same for SQLite and PostgreSQL: which transaction each method runs.

The databases differ only behind the interface of database.py. The records of files and batches are JSON in their rows, next to the
columns that are searched. Rows of lines and results refer to their batch by its `seq`.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from typing import TypeVar

from cluster.batch.errors import StoreError
from cluster.batch.records import ENDED, BatchRecord, FileRecord, Lease, Line, LineError, LineResult
from cluster.batch.store import catalog, running
from cluster.batch.store.database import Database, Session
from cluster.batch.store.interface import Order, ResponseStore
from cluster.batch.store.responses import SqlResponses
from cluster.batch.store.rows import decode, line_row, to_line, to_result
from cluster.batch.store.running import VALIDATING, check_lease
from cluster.batch.store.statements import ANSWERED, DUPLICATES, ENDED_WITH_LINES, INSERT_LINE, PENDING, PLAN, SUSPECTS

_T = TypeVar("_T")
PLAN_ROWS = 5_000  # per transaction; others get their turn in between
PURGE_ROWS = 5_000


class SqlStore:
    """Implements cluster.batch.store.interface.Store."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.responses: ResponseStore = SqlResponses(database)

    # Files

    async def add_file(self, record: FileRecord) -> None:
        await self._database.write(lambda s: catalog.insert_file(s, record))

    async def get_file(self, file_id: str) -> FileRecord | None:
        return await self._database.read(lambda s: catalog.find_file(s, file_id))

    async def list_files(
        self,
        *,
        owner: str | None = None,
        purpose: str | None = None,
        after: str | None = None,
        limit: int = 10_000,
        order: Order = "desc",
    ) -> list[FileRecord]:
        wanted = {"owner": owner, "purpose": purpose}
        find = partial(catalog.page, table="files", wanted=wanted, after=after, limit=limit, order=order)
        return [decode(row[0], FileRecord) for row in await self._database.read(find)]

    async def delete_file(self, file_id: str) -> bool:
        return await self._database.write(lambda s: catalog.delete_file(s, file_id))

    async def expired_files(self, now: float, *, limit: int = 1000) -> list[FileRecord]:
        return await self._database.read(lambda s: catalog.expired_files(s, now, limit))

    # Batches

    async def add_batch(self, batch: BatchRecord) -> None:
        await self._database.write(lambda s: catalog.insert_batch(s, batch))

    async def get_batch(self, batch_id: str) -> BatchRecord | None:
        return await self._database.read(lambda s: catalog.find_batch(s, batch_id))

    async def list_batches(
        self, *, owner: str | None = None, after: str | None = None, limit: int = 20
    ) -> list[BatchRecord]:
        wanted = {"owner": owner}
        find = partial(catalog.page, table="batches", wanted=wanted, after=after, limit=limit, order="desc")
        return [decode(row[0], BatchRecord) for row in await self._database.read(find)]

    async def running_batches(self) -> list[BatchRecord]:
        return await self._database.read(catalog.running_batches)

    async def cancel_batch(self, batch_id: str, *, now: float) -> BatchRecord | None:
        return await self._database.write(lambda s: catalog.cancel_batch(s, batch_id, now))

    # Leases

    async def acquire(
        self, owner: str, *, ttl_s: float, now: float, batch_id: str | None = None, is_dead: Callable[[str], bool]
    ) -> tuple[Lease, BatchRecord] | None:
        return await self._database.write(
            lambda s: running.acquire(s, owner, ttl_s=ttl_s, now=now, batch_id=batch_id, is_dead=is_dead)
        )

    async def renew(self, lease: Lease, *, ttl_s: float, now: float) -> BatchRecord:
        return await self._database.write(lambda s: running.renew(s, lease, ttl_s=ttl_s, now=now))

    async def release(self, lease: Lease) -> None:
        await self._database.write(lambda s: running.release(s, lease))

    # Validation

    async def add_lines(self, lease: Lease, lines: Sequence[Line]) -> None:
        def work(s: Session) -> None:
            seq, _ = check_lease(s, lease, *VALIDATING)
            s.execute_many(INSERT_LINE, [line_row(seq, line) for line in lines])

        await self._database.write(work)

    async def clear_lines(self, lease: Lease) -> None:
        seq = await self._seq(lease)
        await self._delete_lines(seq, lambda s: check_lease(s, lease, *VALIDATING))

    async def duplicates(self, lease: Lease, *, limit: int) -> list[Line]:
        seq = await self._seq(lease)
        rows = await self._database.read(lambda s: s.execute(DUPLICATES, (seq, seq, limit)))
        return [to_line(row) for row in rows]

    async def fail(self, lease: Lease, errors: Sequence[LineError], *, now: float) -> BatchRecord:
        return await self._database.write(lambda s: running.fail(s, lease, errors, now=now))

    async def plan(self, lease: Lease) -> None:
        seq = await self._seq(lease)
        await self._delete_in_chunks(seq, "line_order", "position", lambda s: check_lease(s, lease, *VALIDATING))
        positions = itertools.count(1)
        async with aclosing(self._database.stream(PLAN, (seq, seq), num_rows=PLAN_ROWS)) as stream:
            async for rows in stream:
                placed = [(seq, next(positions), number) for (number,) in rows]

                def work(s: Session, placed: list[tuple[int, int, int]] = placed) -> None:
                    check_lease(s, lease, *VALIDATING)
                    s.execute_many("INSERT INTO line_order VALUES (?, ?, ?)", placed)

                await self._database.write(work)

    async def start(self, lease: Lease, *, now: float, model: str | None) -> BatchRecord:
        return await self._database.write(lambda s: running.start(s, lease, now=now, model=model))

    # Running

    async def pending_lines(self, batch_id: str, *, after: int, limit: int) -> list[Line]:
        rows = await self._read_batch(batch_id, lambda s, seq: s.execute(PENDING, (seq, after, limit)))
        return [to_line(row, position=row[8]) for row in rows]

    async def suspects(self, batch_id: str) -> list[Line]:
        rows = await self._read_batch(batch_id, lambda s, seq: s.execute(SUSPECTS, (seq,)))
        return [to_line(row) for row in rows]

    async def add_crashes(self, lease: Lease, crashes: Mapping[int, bool]) -> list[Line]:
        return await self._database.write(lambda s: running.add_crashes(s, lease, crashes))

    async def commit_results(self, lease: Lease, results: Sequence[LineResult]) -> BatchRecord:
        return await self._database.write(lambda s: running.commit_results(s, lease, results))

    async def finalize(self, lease: Lease, *, now: float) -> BatchRecord:
        return await self._database.write(lambda s: running.finalize(s, lease, now=now))

    async def answered(self, batch_id: str, *, after: int, limit: int) -> list[tuple[Line, LineResult | None]]:
        rows = await self._read_batch(batch_id, lambda s, seq: s.execute(ANSWERED, (seq, after, limit)))
        return [(to_line(row), to_result(row)) for row in rows]

    async def finish(
        self, lease: Lease, *, output: FileRecord | None, errors: FileRecord | None, now: float
    ) -> BatchRecord:
        return await self._database.write(lambda s: running.finish(s, lease, output=output, errors=errors, now=now))

    # Cleaning up

    async def purge(self, batch_id: str) -> None:
        rows = await self._database.read(
            lambda s: s.execute("SELECT seq, status FROM batches WHERE id = ?", (batch_id,))
        )
        if rows and rows[0][1] in ENDED:
            await self._delete_lines(rows[0][0], lambda _: None)

    async def unpurged(self) -> list[str]:
        return [row[0] for row in await self._database.read(lambda s: s.execute(ENDED_WITH_LINES, ENDED))]

    async def close(self) -> None:
        await self._database.close()

    async def _seq(self, lease: Lease) -> int:
        return await self._read_batch(lease.batch_id, lambda _, seq: seq)

    async def _read_batch(self, batch_id: str, work: Callable[[Session, int], _T]) -> _T:
        """Runs `work` with the key of the batch's row."""

        def read(s: Session) -> _T:
            rows = s.execute("SELECT seq FROM batches WHERE id = ?", (batch_id,))
            if not rows:
                raise StoreError(f"The store has no batch {batch_id}.")
            return work(s, rows[0][0])

        return await self._database.read(read)

    async def _delete_lines(self, seq: int, guard: Callable[[Session], object]) -> None:
        await self._delete_in_chunks(seq, "line_order", "position", guard)
        await self._delete_in_chunks(seq, "results", "number", guard)
        # The lines last: while some are left, `unpurged` still finds the batch.
        await self._delete_in_chunks(seq, "lines", "number", guard)

    async def _delete_in_chunks(self, seq: int, table: str, column: str, guard: Callable[[Session], object]) -> None:
        def work(s: Session) -> bool:
            guard(s)
            [(first,)] = s.execute(f"SELECT MIN({column}) FROM {table} WHERE batch = ?", (seq,))
            if first is not None:
                s.execute(f"DELETE FROM {table} WHERE batch = ? AND {column} < ?", (seq, first + PURGE_ROWS))
            return first is not None

        while await self._database.write(work):
            pass
