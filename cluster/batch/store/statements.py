"""The SELECTs of the store, and the steps its transactions are made of.

Knows the tables of database.py and what a row means; opens no transaction itself (sql_store.py).
"""

from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

from cluster.batch.errors import LeaseLostError
from cluster.batch.records import BatchRecord, BatchStatus, FileRecord, Lease, Line, LineResult
from cluster.batch.store.database import Row, Session
from cluster.batch.store.interface import Order
from cluster.batch.store.order import length_class
from workers.errors import RequestError

_T = TypeVar("_T")
RUNNING: tuple[BatchStatus, ...] = ("validating", "in_progress", "finalizing", "cancelling")
LINE_COLUMNS = "l.number, l.custom_id, l.start, l.num_bytes, l.group_key, l.num_tokens, l.crashes, l.lone_crashes"
RUNNING_MARKS = ", ".join("?" for _ in RUNNING)
PLAN = """
SELECT l.number FROM lines l JOIN (
    SELECT group_key, MAX(length_class) AS longest, SUM(num_tokens) AS work FROM lines WHERE batch = ? GROUP BY group_key
) g ON g.group_key = l.group_key WHERE l.batch = ?
ORDER BY g.longest DESC, g.work DESC, l.group_key, l.num_tokens DESC, l.number
"""
DUPLICATES = f"""
SELECT {LINE_COLUMNS} FROM lines l JOIN (
    SELECT custom_id, MIN(number) AS first FROM lines WHERE batch = ? GROUP BY custom_id HAVING COUNT(*) > 1
) d ON d.custom_id = l.custom_id WHERE l.batch = ? AND l.number > d.first ORDER BY l.number LIMIT ?
"""
PENDING = f"""
SELECT {LINE_COLUMNS}, o.position FROM line_order o JOIN lines l ON l.batch = o.batch AND l.number = o.number
WHERE o.batch = ? AND o.position > ? AND l.crashes = 0
AND NOT EXISTS (SELECT 1 FROM results r WHERE r.batch = o.batch AND r.number = o.number)
ORDER BY o.position LIMIT ?
"""
SUSPECTS = f"""
SELECT {LINE_COLUMNS} FROM lines l WHERE l.batch = ? AND l.crashes > 0
AND NOT EXISTS (SELECT 1 FROM results r WHERE r.batch = l.batch AND r.number = l.number)
ORDER BY l.number
"""
ANSWERED = f"""
SELECT {LINE_COLUMNS}, r.status_code, r.request_id, r.error_code, r.error_message,
r.num_prompt_tokens, r.num_cached_tokens, r.num_output_tokens, r.body
FROM lines l LEFT JOIN results r ON r.batch = l.batch AND r.number = l.number
WHERE l.batch = ? AND l.number > ? ORDER BY l.number LIMIT ?
"""
INSERT_LINE = "INSERT INTO lines VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
INSERT_RESULT = "INSERT INTO results VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"


def decode(data: bytes, kind: type[_T]) -> _T:
    return msgspec.json.decode(bytes(data), type=kind)


def find_file(s: Session, file_id: str, lock: str = "") -> FileRecord | None:
    rows = s.execute("SELECT record FROM files WHERE id = ?" + lock, (file_id,))
    return decode(rows[0][0], FileRecord) if rows else None


def insert_file(s: Session, record: FileRecord) -> None:
    s.execute(
        "INSERT INTO files (id, owner, purpose, expires_at, record) VALUES (?, ?, ?, ?, ?)",
        (record.id, record.owner, record.purpose, record.expires_at, msgspec.json.encode(record)),
    )


def page(
    s: Session, table: str, wanted: dict[str, str | None], after: str | None, limit: int, order: Order
) -> list[Row]:
    where, parameters = ["1 = 1"], list[Any]()
    for column, value in wanted.items():
        if value is not None:
            where.append(f"{column} = ?")
            parameters.append(value)
    if after is not None:
        found = s.execute(f"SELECT seq FROM {table} WHERE id = ?", (after,))
        if not found:
            raise RequestError("'after' names nothing that exists; use the id of a listed object.", param="after")
        where.append("seq < ?" if order == "desc" else "seq > ?")
        parameters.append(found[0][0])
    direction = "DESC" if order == "desc" else "ASC"
    sql = f"SELECT record FROM {table} WHERE {' AND '.join(where)} ORDER BY seq {direction} LIMIT ?"
    return s.execute(sql, (*parameters, limit))


def take(
    s: Session, batch_id: str, owner: str, *, ttl_s: float, now: float, is_dead: Callable[[str], bool]
) -> tuple[Lease, BatchRecord] | None:
    sql = "SELECT record, lease_owner, lease_fence, lease_expires_at FROM batches WHERE id = ?" + s.lock
    [(data, holder, fence, lease_expires_at)] = s.execute(sql, (batch_id,))
    batch = decode(data, BatchRecord)
    if batch.has_ended or (holder is not None and lease_expires_at > now and not is_dead(holder)):
        return None
    s.execute(
        "UPDATE batches SET lease_owner = ?, lease_fence = ?, lease_expires_at = ? WHERE id = ?",
        (owner, fence + 1, now + ttl_s, batch_id),
    )
    return Lease(batch_id=batch_id, owner=owner, fence=fence + 1), batch


def held(s: Session, lease: Lease, *statuses: BatchStatus) -> tuple[int, BatchRecord]:
    """The batch's seq and record, locked. Raises LeaseLostError for another runner's, or for one past these statuses."""
    rows = s.execute("SELECT seq, record, lease_fence FROM batches WHERE id = ?" + s.lock, (lease.batch_id,))
    if not rows or rows[0][2] != lease.fence:
        raise LeaseLostError(f"Another runner has taken {lease.batch_id} over.")
    batch = decode(rows[0][1], BatchRecord)
    if statuses and batch.status not in statuses:
        raise LeaseLostError(f"{lease.batch_id} is {batch.status}; nothing more can be stored for it.")
    return rows[0][0], batch


def save(s: Session, batch: BatchRecord) -> BatchRecord:
    s.execute(
        "UPDATE batches SET status = ?, record = ? WHERE id = ?", (batch.status, msgspec.json.encode(batch), batch.id)
    )
    return batch


def let_go(s: Session, lease: Lease) -> None:
    s.execute("UPDATE batches SET lease_owner = NULL, lease_expires_at = 0 WHERE id = ?", (lease.batch_id,))


def end(batch: BatchRecord, *, is_whole: bool, now: int) -> BatchRecord:
    if batch.status == "cancelling":
        return msgspec.structs.replace(batch, status="cancelled", cancelled_at=now)
    if not is_whole:
        return msgspec.structs.replace(batch, status="expired", expired_at=now)
    return msgspec.structs.replace(batch, status="completed", completed_at=now)


def to_line(row: Row, position: int = 0) -> Line:
    number, custom_id, offset, num_bytes, group_key, num_tokens, crashes, lone_crashes = row[:8]
    return Line(
        number=number,
        custom_id=custom_id,
        offset=offset,
        num_bytes=num_bytes,
        group_key=group_key,
        num_tokens=num_tokens,
        crashes=crashes,
        lone_crashes=lone_crashes,
        position=position,
    )


def to_result(row: Row) -> LineResult | None:
    status_code, request_id, error_code, error_message, num_prompt, num_cached, num_output, body = row[8:]
    if request_id is None:  # no row of results was joined
        return None
    return LineResult(
        number=row[0],
        status_code=status_code,
        request_id=request_id,
        error_code=error_code,
        error_message=error_message,
        num_prompt_tokens=num_prompt,
        num_cached_tokens=num_cached,
        num_output_tokens=num_output,
        body=bytes(body),
    )


def line_row(seq: int, line: Line) -> Row:
    """For INSERT_LINE."""
    place = (seq, line.number, line.custom_id, line.offset, line.num_bytes)
    kind = (line.group_key, line.num_tokens, length_class(line.num_tokens))
    return (*place, *kind, line.crashes, line.lone_crashes)


def result_row(seq: int, result: LineResult) -> Row:
    """For INSERT_RESULT."""
    error = (result.error_code, result.error_message)
    counts = (result.num_prompt_tokens, result.num_cached_tokens, result.num_output_tokens)
    return (seq, result.number, result.status_code, result.request_id, *error, *counts, result.body)
