"""The store of responses in SQL, the same for SQLite and PostgreSQL: their records, requests, steps and leases.

Each method is one transaction. A runner's steps are stored under its lease: the fence is compared in the same transaction, so that a
runner that was paused, or whose response was cancelled or deleted, stores nothing more. Knows the tables of database.py; what a step
means is in cluster/responses.
"""

from collections.abc import Callable, Sequence

import msgspec

from cluster.batch.store.database import Database, Session
from cluster.batch.store.rows import decode
from cluster.responses.records import (
    Append,
    ResponseLease,
    ResponseRecord,
    Step,
    Stored,
    StoredRequest,
    decode_steps,
)
from workers.errors import RequestError

_RUNNING = "status IN ('queued', 'in_progress')"  # as the partial index of the table says it
_request_encoder = msgspec.msgpack.Encoder()
_request_decoder = msgspec.msgpack.Decoder(StoredRequest)


class SqlResponses:
    """Implements cluster.batch.store.interface.ResponseStore."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, stored: Stored, *, owner: str | None, ttl_s: float, now: float) -> ResponseLease | None:
        record = stored.record
        request = _request_encoder.encode(stored.request)

        fence = 0 if owner is None else 1

        def work(s: Session) -> None:
            expires_at = 0.0 if owner is None else s.clock(now) + ttl_s
            s.execute(
                "INSERT INTO responses (id, owner, status, expires_at, record, lease_owner, lease_fence, lease_expires_at) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (record.id, record.owner, record.status, record.expires_at, _encode(record), owner, fence, expires_at),
            )
            seq = _seq(s, record.id)
            s.execute("INSERT INTO response_requests VALUES (?, ?)", (seq, request))

        await self._database.write(work)
        return None if owner is None else ResponseLease(response_id=record.id, owner=owner, fence=fence)

    async def get(self, response_id: str) -> Stored | None:
        return await self._database.read(lambda s: _find(s, response_id))

    async def follow(self, response_id: str, *, after: int) -> tuple[ResponseRecord, list[Step]] | None:
        def work(s: Session) -> tuple[ResponseRecord, list[Step]] | None:
            rows = s.execute("SELECT seq, record FROM responses WHERE id = ?", (response_id,))
            if not rows:
                return None
            return decode(rows[0][1], ResponseRecord), _steps(s, rows[0][0], after=after)

        return await self._database.read(work)

    async def chain(self, response_id: str, *, most: int) -> list[Stored]:
        def work(s: Session) -> list[Stored]:
            found: list[Stored] = []
            wanted: str | None = response_id
            while wanted is not None:
                stored = _find(s, wanted)
                if stored is None:
                    which = (
                        "does not exist" if not found else "is gone, and a later response of the conversation needs it"
                    )
                    raise RequestError(
                        f"The previous response {wanted[:80]!r} {which}.",
                        remedy="Send the whole conversation as 'input'.",
                        param="previous_response_id",
                        code="previous_response_not_found",
                    )
                found.append(stored)
                if len(found) > most:
                    raise RequestError(
                        f"The conversation has more than {most} responses.",
                        remedy="Send the whole conversation as 'input'.",
                        param="previous_response_id",
                    )
                wanted = stored.record.previous_response_id
            return found[::-1]

        return await self._database.read(work)

    async def acquire(
        self, owner: str, *, ttl_s: float, now: float, most: int, is_dead: Callable[[str], bool]
    ) -> list[tuple[ResponseLease, Stored, list[Step]]]:
        def is_free(holder: str | None, expires_at: float, at: float) -> bool:
            return holder is None or expires_at <= at or is_dead(holder)

        sql = f"SELECT seq, lease_owner, lease_expires_at FROM responses WHERE {_RUNNING} ORDER BY seq"

        def look(s: Session) -> bool:
            at = s.clock(now)
            return any(is_free(holder, expires_at, at) for _, holder, expires_at in s.execute(sql))

        def work(s: Session) -> list[tuple[ResponseLease, Stored, list[Step]]]:
            at = s.clock(now)
            taken: list[tuple[ResponseLease, Stored, list[Step]]] = []
            for seq, _, _ in s.execute(sql):
                if len(taken) >= most:
                    break
                lease = _try_lease(s, seq, owner, until=at + ttl_s, is_free=lambda h, e: is_free(h, e, at))
                if lease is not None:
                    stored = _find(s, lease.response_id)
                    assert stored is not None, "its row is locked"
                    taken.append((lease, stored, _steps(s, seq, after=0)))
            return taken

        # Most of the time there is nothing to take, and a reader delays no writer.
        return await self._database.write(work) if await self._database.read(look) else []

    async def adapters(self) -> set[str]:
        sql = f"SELECT q.data FROM responses r JOIN response_requests q ON q.response = r.seq WHERE {_RUNNING}"

        def work(s: Session) -> set[str]:
            requests = [_request_decoder.decode(bytes(data)) for (data,) in s.execute(sql)]
            return {r.generate.adapter for r in requests if r.generate.adapter is not None}

        return await self._database.read(work)

    async def renew(self, leases: Sequence[ResponseLease], *, ttl_s: float, now: float) -> set[str]:
        def work(s: Session) -> set[str]:
            held = _held(s, leases)
            until = s.clock(now) + ttl_s
            s.execute_many(
                "UPDATE responses SET lease_expires_at = ? WHERE seq = ?", [(until, q) for q in held.values()]
            )
            return {lease.response_id for lease in leases} - set(held)

        return await self._database.write(work)

    async def release(self, lease: ResponseLease) -> None:
        sql = "UPDATE responses SET lease_owner = NULL, lease_expires_at = 0 WHERE id = ? AND lease_fence = ?"
        await self._database.write(lambda s: s.execute(sql, (lease.response_id, lease.fence)))

    async def append(self, appends: Sequence[Append]) -> set[str]:
        def work(s: Session) -> set[str]:
            held = _held(s, [a.lease for a in appends])
            kept = [a for a in appends if a.lease.response_id in held]
            s.execute_many(
                "INSERT INTO response_steps VALUES (?, ?, ?)",
                [(held[a.lease.response_id], a.number, a.data) for a in kept if a.data],
            )
            for append in kept:
                if append.record is not None:
                    _update(s, held[append.lease.response_id], append.record)
            return {a.lease.response_id for a in appends} - set(held)

        return await self._database.write(work)

    async def end(
        self, response_id: str, build: Callable[[Stored, list[Step]], ResponseRecord]
    ) -> ResponseRecord | None:
        def work(s: Session) -> ResponseRecord | None:
            rows = s.execute("SELECT seq, lease_fence FROM responses WHERE id = ?" + s.lock, (response_id,))
            stored = _find(s, response_id) if rows else None
            if stored is None:
                return None
            if stored.record.has_ended:
                return stored.record
            [(seq, fence)] = rows
            ended = build(stored, _steps(s, seq, after=0))
            s.execute("UPDATE responses SET lease_fence = ? WHERE seq = ?", (fence + 1, seq))
            _update(s, seq, ended)
            return ended

        return await self._database.write(work)

    async def delete(self, response_id: str) -> bool:
        def work(s: Session) -> bool:
            rows = s.execute("SELECT seq FROM responses WHERE id = ?" + s.lock, (response_id,))
            for (seq,) in rows:
                _delete(s, seq)
            return bool(rows)

        return await self._database.write(work)

    async def delete_expired(self, now: float, *, limit: int) -> int:
        def work(s: Session) -> int:
            sql = "SELECT seq FROM responses WHERE expires_at <= ? ORDER BY expires_at LIMIT ?" + s.lock
            rows = s.execute(sql, (int(now), limit))
            for (seq,) in rows:
                _delete(s, seq)
            return len(rows)

        return await self._database.write(work)


def _encode(record: ResponseRecord) -> bytes:
    return msgspec.json.encode(record)


def _seq(s: Session, response_id: str) -> int:
    [(seq,)] = s.execute("SELECT seq FROM responses WHERE id = ?", (response_id,))
    return int(seq)


def _find(s: Session, response_id: str) -> Stored | None:
    sql = "SELECT r.record, q.data FROM responses r JOIN response_requests q ON q.response = r.seq WHERE r.id = ?"
    rows = s.execute(sql, (response_id,))
    if not rows:
        return None
    return Stored(record=decode(rows[0][0], ResponseRecord), request=_request_decoder.decode(bytes(rows[0][1])))


def _steps(s: Session, seq: int, *, after: int) -> list[Step]:
    """From the step number `after` on. A row has several steps, and its number is that of the first."""
    first = s.execute("SELECT MAX(number) FROM response_steps WHERE response = ? AND number <= ?", (seq, after))[0][0]
    rows = s.execute(
        "SELECT number, data FROM response_steps WHERE response = ? AND number >= ? ORDER BY number", (seq, first or 0)
    )
    if not rows:
        return []
    steps = [step for _, data in rows for step in decode_steps(bytes(data))]
    return steps[max(0, after - rows[0][0]) :]


def _try_lease(
    s: Session, seq: int, owner: str, *, until: float, is_free: Callable[[str | None, float], bool]
) -> ResponseLease | None:
    sql = f"SELECT id, lease_owner, lease_fence, lease_expires_at FROM responses WHERE seq = ? AND {_RUNNING}" + s.lock
    for response_id, holder, fence, expires_at in s.execute(sql, (seq,)):
        if not is_free(holder, expires_at):
            continue
        s.execute(
            "UPDATE responses SET lease_owner = ?, lease_fence = ?, lease_expires_at = ? WHERE seq = ?",
            (owner, fence + 1, until, seq),
        )
        return ResponseLease(response_id=response_id, owner=owner, fence=fence + 1)
    return None


def _held(s: Session, leases: Sequence[ResponseLease]) -> dict[str, int]:
    """The keys of the rows whose leases still count, locked; by response id."""
    fences = {lease.response_id: lease.fence for lease in leases}
    marks = ", ".join("?" * len(fences))
    sql = f"SELECT id, seq, lease_fence FROM responses WHERE id IN ({marks}) ORDER BY seq" + s.lock
    return {found: seq for found, seq, fence in s.execute(sql, tuple(fences)) if fence == fences[found]}


def _update(s: Session, seq: int, record: ResponseRecord) -> None:
    ends = ", lease_owner = NULL, lease_expires_at = 0" if record.has_ended else ""
    s.execute(f"UPDATE responses SET status = ?, record = ?{ends} WHERE seq = ?", (record.status, _encode(record), seq))


def _delete(s: Session, seq: int) -> None:
    for table, column in (("response_steps", "response"), ("response_requests", "response"), ("responses", "seq")):
        s.execute(f"DELETE FROM {table} WHERE {column} = ?", (seq,))
