"""The transactions that manage files and batches as a whole: adding, finding, listing, deleting, cancelling.

Each function runs inside an open transaction (a Session). What a runner changes under its lease is in running.py.
"""

from typing import Any

import msgspec

from cluster.batch.records import BatchRecord, FileRecord
from cluster.batch.store.database import Row, Session
from cluster.batch.store.interface import Order
from cluster.batch.store.rows import decode
from cluster.batch.store.statements import EXPIRED_FILES, RUNNING, RUNNING_MARKS
from workers.errors import RequestError


def find_file(s: Session, file_id: str, lock: str = "") -> FileRecord | None:
    rows = s.execute("SELECT record FROM files WHERE id = ?" + lock, (file_id,))
    return decode(rows[0][0], FileRecord) if rows else None


def insert_file(s: Session, record: FileRecord) -> None:
    s.execute(
        "INSERT INTO files (id, owner, purpose, expires_at, record) VALUES (?, ?, ?, ?, ?)",
        (record.id, record.owner, record.purpose, record.expires_at, msgspec.json.encode(record)),
    )


def delete_file(s: Session, file_id: str) -> bool:
    """Returns whether the file existed. Raises RequestError while a batch reads it."""
    if find_file(s, file_id, s.lock) is None:
        return False
    users = s.execute(
        f"SELECT id FROM batches WHERE input_file_id = ? AND status IN ({RUNNING_MARKS})", (file_id, *RUNNING)
    )
    if users:
        raise RequestError(
            f"The file is the input of {users[0][0]}, which has not ended.",
            remedy="Cancel that batch first.",
            param="file_id",
            code="file_in_use",
        )
    s.execute("DELETE FROM files WHERE id = ?", (file_id,))
    return True


def expired_files(s: Session, now: float, limit: int) -> list[FileRecord]:
    return [decode(row[0], FileRecord) for row in s.execute(EXPIRED_FILES, (int(now), *RUNNING, limit))]


def insert_batch(s: Session, batch: BatchRecord) -> None:
    """Raises RequestError when its input file does not exist."""
    if find_file(s, batch.input_file_id, s.lock) is None:
        raise RequestError(
            "The input file does not exist.", remedy="Upload it first.", param="input_file_id", code="file_not_found"
        )
    s.execute(
        "INSERT INTO batches (id, owner, status, input_file_id, record) VALUES (?, ?, ?, ?, ?)",
        (batch.id, batch.owner, batch.status, batch.input_file_id, msgspec.json.encode(batch)),
    )


def find_batch(s: Session, batch_id: str, lock: str = "") -> BatchRecord | None:
    rows = s.execute("SELECT record FROM batches WHERE id = ?" + lock, (batch_id,))
    return decode(rows[0][0], BatchRecord) if rows else None


def update_batch(s: Session, batch: BatchRecord) -> BatchRecord:
    s.execute(
        "UPDATE batches SET status = ?, record = ? WHERE id = ?", (batch.status, msgspec.json.encode(batch), batch.id)
    )
    return batch


def running_batches(s: Session) -> list[BatchRecord]:
    rows = s.execute(f"SELECT record FROM batches WHERE status IN ({RUNNING_MARKS}) ORDER BY seq", RUNNING)
    return [decode(row[0], BatchRecord) for row in rows]


def cancel_batch(s: Session, batch_id: str, now: float) -> BatchRecord | None:
    batch = find_batch(s, batch_id, s.lock)
    if batch is None or batch.status not in ("validating", "in_progress"):
        return batch
    return update_batch(s, msgspec.structs.replace(batch, status="cancelling", cancelling_at=int(now)))


def page(
    s: Session, table: str, wanted: dict[str, str | None], *, after: str | None, limit: int, order: Order
) -> list[Row]:
    """The `record` column of one page of `files` or `batches`. wanted: column -> value; None matches any value."""
    where, parameters = ["1 = 1"], list[Any]()
    for column, value in wanted.items():
        if value is not None:
            where.append(f"{column} = ?")
            parameters.append(value)
    if after is not None:
        found = s.execute(f"SELECT seq FROM {table} WHERE id = ?", (after,))
        if not found:
            raise RequestError(
                "'after' does not name an existing object.", remedy="Use the id of a listed object.", param="after"
            )
        where.append("seq < ?" if order == "desc" else "seq > ?")
        parameters.append(found[0][0])
    direction = "DESC" if order == "desc" else "ASC"
    sql = f"SELECT record FROM {table} WHERE {' AND '.join(where)} ORDER BY seq {direction} LIMIT ?"
    return s.execute(sql, (*parameters, limit))
