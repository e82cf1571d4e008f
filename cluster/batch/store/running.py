"""The transactions of a batch's runner: its lease, and every change that it makes under that lease.

Each function runs inside an open transaction (a Session). The batch's row is read with a lock, and the lease's fence is compared in the
same transaction, so that an older runner changes nothing.
"""

from collections.abc import Callable, Mapping, Sequence

import msgspec

from cluster.batch.errors import LeaseLostError
from cluster.batch.records import BatchRecord, BatchStatus, FileRecord, Lease, Line, LineError, LineResult
from cluster.batch.store.catalog import insert_file, update_batch
from cluster.batch.store.database import Session
from cluster.batch.store.rows import decode, result_row, to_line
from cluster.batch.store.statements import INSERT_RESULT, LINE_COLUMNS, RUNNING, RUNNING_MARKS

VALIDATING: tuple[BatchStatus, ...] = ("validating", "cancelling")


def acquire(
    s: Session, owner: str, *, ttl_s: float, now: float, batch_id: str | None, is_dead: Callable[[str], bool]
) -> tuple[Lease, BatchRecord] | None:
    """A lease on the oldest batch that is free, or on `batch_id`; None if there is none."""
    which, parameters = ("", ()) if batch_id is None else (" AND id = ?", (batch_id,))
    sql = f"SELECT id FROM batches WHERE status IN ({RUNNING_MARKS}){which} ORDER BY seq"
    for (found,) in s.execute(sql, (*RUNNING, *parameters)):
        taken = _try_lease(s, found, owner, ttl_s=ttl_s, now=s.clock(now), is_dead=is_dead)
        if taken is not None:
            return taken
    return None


def _try_lease(
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


def renew(s: Session, lease: Lease, *, ttl_s: float, now: float) -> BatchRecord:
    _, batch = check_lease(s, lease)
    s.execute("UPDATE batches SET lease_expires_at = ? WHERE id = ?", (s.clock(now) + ttl_s, lease.batch_id))
    return batch


def release(s: Session, lease: Lease) -> None:
    """Does nothing for a lost lease."""
    sql = "UPDATE batches SET lease_owner = NULL, lease_expires_at = 0 WHERE id = ? AND lease_fence = ?"
    s.execute(sql, (lease.batch_id, lease.fence))


def check_lease(s: Session, lease: Lease, *statuses: BatchStatus) -> tuple[int, BatchRecord]:
    """The key and the record of the batch, locked.

    Raises LeaseLostError when another runner has the batch, or when its status is none of `statuses` (if given).
    """
    rows = s.execute("SELECT seq, record, lease_fence FROM batches WHERE id = ?" + s.lock, (lease.batch_id,))
    if not rows or rows[0][2] != lease.fence:
        raise LeaseLostError(f"Another runner has taken over {lease.batch_id}.")
    batch = decode(rows[0][1], BatchRecord)
    if statuses and batch.status not in statuses:
        raise LeaseLostError(f"{lease.batch_id} is {batch.status}, so nothing more can be stored for it.")
    return rows[0][0], batch


def fail(s: Session, lease: Lease, errors: Sequence[LineError], *, now: float) -> BatchRecord:
    _, batch = check_lease(s, lease, *VALIDATING)
    release(s, lease)
    return update_batch(s, msgspec.structs.replace(batch, status="failed", failed_at=int(now), errors=tuple(errors)))


def start(s: Session, lease: Lease, *, now: float, model: str | None) -> BatchRecord:
    seq, batch = check_lease(s, lease, *VALIDATING)
    if batch.status == "cancelling":
        return batch
    [(num_lines, num_tokens)] = s.execute(
        "SELECT COUNT(*), COALESCE(SUM(num_tokens), 0) FROM lines WHERE batch = ?", (seq,)
    )
    return update_batch(
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


def add_crashes(s: Session, lease: Lease, crashes: Mapping[int, bool]) -> list[Line]:
    seq, _ = check_lease(s, lease)
    s.execute_many(
        "UPDATE lines SET crashes = crashes + 1, lone_crashes = lone_crashes + ? WHERE batch = ? AND number = ?",
        [(int(alone), seq, number) for number, alone in crashes.items()],
    )
    sql = f"SELECT {LINE_COLUMNS} FROM lines l WHERE batch = ? AND number = ?"
    return [to_line(row) for number in crashes for row in s.execute(sql, (seq, number))]


def commit_results(s: Session, lease: Lease, results: Sequence[LineResult]) -> BatchRecord:
    seq, batch = check_lease(s, lease, "in_progress", "cancelling")
    marks = ", ".join("?" * len(results))
    numbers = (seq, *(r.number for r in results))
    known = {n for (n,) in s.execute(f"SELECT number FROM results WHERE batch = ? AND number IN ({marks})", numbers)}
    new = [r for r in {r.number: r for r in reversed(results)}.values() if r.number not in known]
    if not new:
        return batch
    sql = f"SELECT number, num_tokens FROM lines WHERE batch = ? AND number IN ({marks})"
    sizes: dict[int, int] = dict(s.execute(sql, numbers))  # type: ignore[arg-type]  # rows of two
    s.execute_many(INSERT_RESULT, [result_row(seq, r) for r in new])
    num_completed = sum(r.is_completed for r in new)
    return update_batch(
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


def finalize(s: Session, lease: Lease, *, now: float) -> BatchRecord:
    _, batch = check_lease(s, lease, "in_progress", "cancelling", "finalizing")
    status: BatchStatus = "cancelling" if batch.status == "cancelling" else "finalizing"
    since = batch.finalizing_at or int(now)
    return update_batch(s, msgspec.structs.replace(batch, status=status, finalizing_at=since))


def finish(
    s: Session, lease: Lease, *, output: FileRecord | None, errors: FileRecord | None, now: float
) -> BatchRecord:
    _, batch = check_lease(s, lease, "finalizing", "cancelling")
    for record in (output, errors):
        if record is not None:
            insert_file(s, record)
    counted = msgspec.structs.replace(
        batch,
        output_file_id=output.id if output else None,
        error_file_id=errors.id if errors else None,
        num_failed=batch.num_lines - batch.num_completed,
    )
    release(s, lease)
    return update_batch(s, _ended(counted, is_complete=batch.num_answered >= batch.num_lines, now=int(now)))


def _ended(batch: BatchRecord, *, is_complete: bool, now: int) -> BatchRecord:
    if batch.status == "cancelling":
        return msgspec.structs.replace(batch, status="cancelled", cancelled_at=now)
    if not is_complete:
        return msgspec.structs.replace(batch, status="expired", expired_at=now)
    return msgspec.structs.replace(batch, status="completed", completed_at=now)
