"""The Store in SQL, the same for SQLite and PostgreSQL. Knows tables and transactions; the databases differ in database.py's seam only.

A file's and a batch's record lie in their row as JSON, beside the columns that are searched by; every change of a batch reads its row
with a lock, and a runner's change compares the lease's fence in the same transaction. Rows of lines name their batch by its `seq`.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from typing import TypeVar

import msgspec

from cluster.batch.errors import StoreError
from cluster.batch.records import ENDED, BatchRecord, BatchStatus, FileRecord, Lease, Line, LineError, LineResult
from cluster.batch.store.database import Database, Session
from cluster.batch.store.interface import Order
from cluster.batch.store.statements import (
    ANSWERED,
    DUPLICATES,
    INSERT_LINE,
    INSERT_RESULT,
    LINE_COLUMNS,
    PENDING,
    PLAN,
    RUNNING,
    RUNNING_MARKS,
    SUSPECTS,
    decode,
    end,
    find_file,
    held,
    insert_file,
    let_go,
    line_row,
    page,
    result_row,
    save,
    take,
    to_line,
    to_result,
)
from workers.errors import RequestError

_T = TypeVar("_T")
PLAN_ROWS = 5_000  # of one transaction; others get their turn between two
PURGE_ROWS = 5_000


class SqlStore:
    """Implements cluster.batch.store.interface.Store."""

    def __init__(self, database: Database) -> None:
        self._database = database

    # Files

    async def add_file(self, record: FileRecord) -> None:
        await self._database.write(lambda s: insert_file(s, record))

    async def get_file(self, file_id: str) -> FileRecord | None:
        return await self._database.read(lambda s: find_file(s, file_id))

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
        return await self._database.read(
            lambda s: [decode(r[0], FileRecord) for r in page(s, "files", wanted, after, limit, order)]
        )

    async def delete_file(self, file_id: str) -> bool:
        def work(s: Session) -> bool:
            if find_file(s, file_id, s.lock) is None:
                return False
            users = s.execute(
                f"SELECT id FROM batches WHERE input_file_id = ? AND status IN ({RUNNING_MARKS})", (file_id, *RUNNING)
            )
            if users:
                raise RequestError(
                    f"The file is read by {users[0][0]}, which has not ended; cancel that batch first.",
                    param="file_id",
                    code="file_in_use",
                )
            s.execute("DELETE FROM files WHERE id = ?", (file_id,))
            return True

        return await self._database.write(work)

    async def expired_files(self, now: float, *, limit: int = 1000) -> list[FileRecord]:
        sql = f"""SELECT record FROM files f WHERE expires_at <= ? AND NOT EXISTS (
            SELECT 1 FROM batches b WHERE b.input_file_id = f.id AND b.status IN ({RUNNING_MARKS})
        ) ORDER BY seq LIMIT ?"""
        rows = await self._database.read(lambda s: s.execute(sql, (int(now), *RUNNING, limit)))
        return [decode(row[0], FileRecord) for row in rows]

    # Batches

    async def add_batch(self, batch: BatchRecord) -> None:
        def work(s: Session) -> None:
            if find_file(s, batch.input_file_id, s.lock) is None:
                raise RequestError(
                    "The input file does not exist; upload it first.", param="input_file_id", code="file_not_found"
                )
            s.execute(
                "INSERT INTO batches (id, owner, status, input_file_id, record) VALUES (?, ?, ?, ?, ?)",
                (batch.id, batch.owner, batch.status, batch.input_file_id, msgspec.json.encode(batch)),
            )

        await self._database.write(work)

    async def get_batch(self, batch_id: str) -> BatchRecord | None:
        rows = await self._database.read(lambda s: s.execute("SELECT record FROM batches WHERE id = ?", (batch_id,)))
        return decode(rows[0][0], BatchRecord) if rows else None

    async def list_batches(
        self, *, owner: str | None = None, after: str | None = None, limit: int = 20
    ) -> list[BatchRecord]:
        wanted = {"owner": owner}
        return await self._database.read(
            lambda s: [decode(r[0], BatchRecord) for r in page(s, "batches", wanted, after, limit, "desc")]
        )

    async def running_batches(self) -> list[BatchRecord]:
        sql = f"SELECT record FROM batches WHERE status IN ({RUNNING_MARKS}) ORDER BY seq"
        rows = await self._database.read(lambda s: s.execute(sql, RUNNING))
        return [decode(row[0], BatchRecord) for row in rows]

    async def cancel_batch(self, batch_id: str, *, now: float) -> BatchRecord | None:
        def work(s: Session) -> BatchRecord | None:
            rows = s.execute("SELECT record FROM batches WHERE id = ?" + s.lock, (batch_id,))
            if not rows:
                return None
            batch = decode(rows[0][0], BatchRecord)
            if batch.status not in ("validating", "in_progress"):
                return batch
            return save(s, msgspec.structs.replace(batch, status="cancelling", cancelling_at=int(now)))

        return await self._database.write(work)

    # Leases

    async def acquire(
        self, owner: str, *, ttl_s: float, now: float, batch_id: str | None = None, is_dead: Callable[[str], bool]
    ) -> tuple[Lease, BatchRecord] | None:
        def work(s: Session) -> tuple[Lease, BatchRecord] | None:
            which, parameters = ("", ()) if batch_id is None else (" AND id = ?", (batch_id,))
            sql = f"SELECT id FROM batches WHERE status IN ({RUNNING_MARKS}){which} ORDER BY seq"
            for (found,) in s.execute(sql, (*RUNNING, *parameters)):
                taken = take(s, found, owner, ttl_s=ttl_s, now=s.clock(now), is_dead=is_dead)
                if taken is not None:
                    return taken
            return None

        return await self._database.write(work)

    async def renew(self, lease: Lease, *, ttl_s: float, now: float) -> BatchRecord:
        def work(s: Session) -> BatchRecord:
            _, batch = held(s, lease)
            s.execute("UPDATE batches SET lease_expires_at = ? WHERE id = ?", (s.clock(now) + ttl_s, lease.batch_id))
            return batch

        return await self._database.write(work)

    async def release(self, lease: Lease) -> None:
        sql = "UPDATE batches SET lease_owner = NULL, lease_expires_at = 0 WHERE id = ? AND lease_fence = ?"
        await self._database.write(lambda s: s.execute(sql, (lease.batch_id, lease.fence)))

    # Validation

    async def add_lines(self, lease: Lease, lines: Sequence[Line]) -> None:
        def work(s: Session) -> None:
            seq, _ = held(s, lease, "validating", "cancelling")
            s.execute_many(INSERT_LINE, [line_row(seq, line) for line in lines])

        await self._database.write(work)

    async def clear_lines(self, lease: Lease) -> None:
        seq = await self._seq(lease)
        await self._forget(seq, lambda s: held(s, lease, "validating", "cancelling"))

    async def duplicates(self, lease: Lease, *, limit: int) -> list[Line]:
        seq = await self._seq(lease)
        rows = await self._database.read(lambda s: s.execute(DUPLICATES, (seq, seq, limit)))
        return [to_line(row) for row in rows]

    async def fail(self, lease: Lease, errors: Sequence[LineError], *, now: float) -> BatchRecord:
        def work(s: Session) -> BatchRecord:
            _, batch = held(s, lease, "validating", "cancelling")
            failed = msgspec.structs.replace(batch, status="failed", failed_at=int(now), errors=tuple(errors))
            let_go(s, lease)
            return save(s, failed)

        return await self._database.write(work)

    async def plan(self, lease: Lease) -> None:
        seq = await self._seq(lease)
        await self._in_chunks(seq, "line_order", "position", lambda s: held(s, lease, "validating", "cancelling"))
        positions = itertools.count(1)
        async with aclosing(self._database.stream(PLAN, (seq, seq), num_rows=PLAN_ROWS)) as stream:
            async for rows in stream:
                placed = [(seq, next(positions), number) for (number,) in rows]

                def work(s: Session, placed: list[tuple[int, int, int]] = placed) -> None:
                    held(s, lease, "validating", "cancelling")
                    s.execute_many("INSERT INTO line_order VALUES (?, ?, ?)", placed)

                await self._database.write(work)

    async def start(self, lease: Lease, *, now: float, model: str | None) -> BatchRecord:
        def work(s: Session) -> BatchRecord:
            seq, batch = held(s, lease, "validating", "cancelling")
            if batch.status == "cancelling":
                return batch
            [(num_lines, num_tokens)] = s.execute(
                "SELECT COUNT(*), COALESCE(SUM(num_tokens), 0) FROM lines WHERE batch = ?", (seq,)
            )
            return save(
                s,
                msgspec.structs.replace(
                    batch,
                    status="in_progress",
                    in_progress_at=int(now),
                    num_lines=num_lines,
                    estimated_tokens=int(num_tokens),
                    model=model,
                ),
            )

        return await self._database.write(work)

    # Running

    async def pending_lines(self, batch_id: str, *, after: int, limit: int) -> list[Line]:
        rows = await self._of_batch(batch_id, lambda s, seq: s.execute(PENDING, (seq, after, limit)))
        return [to_line(row, position=row[8]) for row in rows]

    async def suspects(self, batch_id: str) -> list[Line]:
        rows = await self._of_batch(batch_id, lambda s, seq: s.execute(SUSPECTS, (seq,)))
        return [to_line(row) for row in rows]

    async def add_crashes(self, lease: Lease, crashes: Mapping[int, bool]) -> list[Line]:
        def work(s: Session) -> list[Line]:
            seq, _ = held(s, lease)
            s.execute_many(
                "UPDATE lines SET crashes = crashes + 1, lone_crashes = lone_crashes + ? WHERE batch = ? AND number = ?",
                [(int(alone), seq, number) for number, alone in crashes.items()],
            )
            found: list[Line] = []
            for n in crashes:
                rows = s.execute(f"SELECT {LINE_COLUMNS} FROM lines l WHERE batch = ? AND number = ?", (seq, n))
                found += [to_line(row) for row in rows]
            return found

        return await self._database.write(work)

    async def commit_results(self, lease: Lease, results: Sequence[LineResult]) -> BatchRecord:
        def work(s: Session) -> BatchRecord:
            seq, batch = held(s, lease, "in_progress", "cancelling")
            marks = ", ".join("?" * len(results))
            numbers = (seq, *(r.number for r in results))
            known = {
                n for (n,) in s.execute(f"SELECT number FROM results WHERE batch = ? AND number IN ({marks})", numbers)
            }
            new = [r for r in {r.number: r for r in reversed(results)}.values() if r.number not in known]
            if not new:
                return batch
            sql = f"SELECT number, num_tokens FROM lines WHERE batch = ? AND number IN ({marks})"
            sizes: dict[int, int] = dict(s.execute(sql, numbers))  # type: ignore[arg-type]  # rows of two
            s.execute_many(INSERT_RESULT, [result_row(seq, r) for r in new])
            num_completed = sum(r.is_completed for r in new)
            return save(
                s,
                msgspec.structs.replace(
                    batch,
                    num_completed=batch.num_completed + num_completed,
                    num_failed=batch.num_failed + len(new) - num_completed,
                    answered_tokens=batch.answered_tokens + sum(sizes[r.number] for r in new),
                    num_prompt_tokens=batch.num_prompt_tokens + sum(r.num_prompt_tokens for r in new),
                    num_cached_tokens=batch.num_cached_tokens + sum(r.num_cached_tokens for r in new),
                    num_output_tokens=batch.num_output_tokens + sum(r.num_output_tokens for r in new),
                ),
            )

        return await self._database.write(work)

    async def finalize(self, lease: Lease, *, now: float) -> BatchRecord:
        def work(s: Session) -> BatchRecord:
            _, batch = held(s, lease, "in_progress", "cancelling", "finalizing")
            status: BatchStatus = "cancelling" if batch.status == "cancelling" else "finalizing"
            since = batch.finalizing_at or int(now)
            return save(s, msgspec.structs.replace(batch, status=status, finalizing_at=since))

        return await self._database.write(work)

    async def answered(self, batch_id: str, *, after: int, limit: int) -> list[tuple[Line, LineResult | None]]:
        rows = await self._of_batch(batch_id, lambda s, seq: s.execute(ANSWERED, (seq, after, limit)))
        return [(to_line(row), to_result(row)) for row in rows]

    async def finish(
        self, lease: Lease, *, output: FileRecord | None, errors: FileRecord | None, now: float
    ) -> BatchRecord:
        def work(s: Session) -> BatchRecord:
            _, batch = held(s, lease, "finalizing", "cancelling")
            for record in (output, errors):
                if record is not None:
                    insert_file(s, record)
            counted = msgspec.structs.replace(
                batch,
                output_file_id=output.id if output else None,
                error_file_id=errors.id if errors else None,
                num_failed=batch.num_lines - batch.num_completed,
            )
            let_go(s, lease)
            return save(s, end(counted, is_whole=batch.num_answered >= batch.num_lines, now=int(now)))

        return await self._database.write(work)

    async def purge(self, batch_id: str) -> None:
        rows = await self._database.read(
            lambda s: s.execute("SELECT seq, status FROM batches WHERE id = ?", (batch_id,))
        )
        if rows and rows[0][1] in ENDED:
            await self._forget(rows[0][0], lambda _: None)

    async def unpurged(self) -> list[str]:
        marks = ", ".join("?" * len(ENDED))
        sql = f"SELECT id FROM batches b WHERE status IN ({marks}) AND EXISTS (SELECT 1 FROM lines l WHERE l.batch = b.seq)"
        return [row[0] for row in await self._database.read(lambda s: s.execute(sql, ENDED))]

    async def close(self) -> None:
        await self._database.close()

    async def _seq(self, lease: Lease) -> int:
        return await self._of_batch(lease.batch_id, lambda _, seq: seq)

    async def _of_batch(self, batch_id: str, work: Callable[[Session, int], _T]) -> _T:
        def read(s: Session) -> _T:
            rows = s.execute("SELECT seq FROM batches WHERE id = ?", (batch_id,))
            if not rows:
                raise StoreError(f"The store has no batch {batch_id}.")
            return work(s, rows[0][0])

        return await self._database.read(read)

    async def _forget(self, seq: int, guard: Callable[[Session], object]) -> None:
        await self._in_chunks(seq, "line_order", "position", guard)
        await self._in_chunks(seq, "results", "number", guard)
        await self._in_chunks(
            seq, "lines", "number", guard
        )  # last: as long as there are lines, it is known to be unfinished

    async def _in_chunks(self, seq: int, table: str, column: str, guard: Callable[[Session], object]) -> None:
        def work(s: Session) -> bool:
            guard(s)
            [(first,)] = s.execute(f"SELECT MIN({column}) FROM {table} WHERE batch = ?", (seq,))
            if first is not None:
                s.execute(f"DELETE FROM {table} WHERE batch = ? AND {column} < ?", (seq, first + PURGE_ROWS))
            return first is not None

        while await self._database.write(work):
            pass
