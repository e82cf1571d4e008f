"""The store, with the same cases for each database: records, pages, leases and fences, the order of lines, results."""

import asyncio
import random
import time

import msgspec
import pytest
from support.batch.batches import FAST, SimulatedExecutor, add_batch, read_lines, request, requests, texts

from cluster.batch.errors import LeaseLostError, StoreError
from cluster.batch.files import FileContents
from cluster.batch.records import BatchRecord, FileRecord, Lease, Line, LineError, LineResult
from cluster.batch.run.runner import run_batch
from cluster.batch.store.open import open_store
from cluster.batch.store.order import order
from workers.errors import RequestError

NEVER = lambda _: False  # noqa: E731 - no owner is known to be dead


def a_file(name: str, **fields) -> FileRecord:
    whole = {"purpose": "batch", **fields}
    return FileRecord(id=name, filename="in.jsonl", num_bytes=3, created_at=1, **whole)


def a_batch(name: str, file_id: str = "file-1", **fields) -> BatchRecord:
    whole = {"completion_window": "24h", "created_at": 1, "expires_at": 10**10, **fields}
    return BatchRecord(id=name, endpoint="/v1/completions", input_file_id=file_id, **whole)


def a_line(number: int, **fields) -> Line:
    return Line(**{"number": number, "custom_id": f"r{number}", "offset": number * 10, "num_bytes": 9, **fields})


def ok(number: int, **fields) -> LineResult:
    return LineResult(**{"number": number, "status_code": 200, "request_id": "q", "body": b"{}", **fields})


async def started(store, lines, batch_id="batch_1") -> Lease:
    await store.add_file(a_file(f"file-of-{batch_id}"))
    await store.add_batch(a_batch(batch_id, f"file-of-{batch_id}"))
    lease, _ = await store.acquire("me", ttl_s=60, now=time.time(), batch_id=batch_id, is_dead=NEVER)
    await store.add_lines(lease, lines)
    await store.plan(lease)
    await store.start(lease, now=5, model="m")
    return lease


async def test_files(store):
    records = [a_file(f"file-{i}", owner="ab"[i % 2], purpose=["batch", "batch_output"][i == 5]) for i in range(6)]
    for record in records:
        await store.add_file(record)
    ids = lambda found: [r.id[-1] for r in found]  # noqa: E731
    assert await store.get_file("file-3") == records[3]
    assert await store.get_file("nothing") is None
    assert ids(await store.list_files()) == list("543210")
    assert ids(await store.list_files(order="asc", limit=2)) == list("01")
    assert ids(await store.list_files(order="asc", limit=2, after="file-1")) == list("23")
    assert ids(await store.list_files(after="file-3", owner="a")) == list("20")
    assert ids(await store.list_files(purpose="batch_output")) == list("5")
    with pytest.raises(RequestError, match="after"):
        await store.list_files(after="file-77")
    assert await store.delete_file("file-2")
    assert not await store.delete_file("file-2")
    assert ids(await store.list_files()) == list("54310")


async def test_a_file_in_use_stays(store):
    await store.add_file(a_file("file-1", expires_at=100))
    await store.add_file(a_file("file-2", expires_at=100))
    await store.add_file(a_file("file-3", expires_at=300))
    await store.add_batch(a_batch("batch_1"))
    with pytest.raises(RequestError, match="batch_1, which has not ended") as caught:
        await store.delete_file("file-1")
    assert caught.value.code == "file_in_use"
    assert [r.id for r in await store.expired_files(200)] == ["file-2"]
    with pytest.raises(RequestError, match="does not exist"):
        await store.add_batch(a_batch("batch_2", "file-9"))
    lease, _ = await store.acquire("me", ttl_s=9, now=1, is_dead=NEVER)
    await store.fail(lease, [LineError(code="x", message="y", line=3)], now=7)
    assert await store.delete_file("file-1")
    assert (await store.get_batch("batch_1")).errors == (LineError(code="x", message="y", line=3),)


async def test_batches_are_listed_newest_first(store):
    await store.add_file(a_file("file-1"))
    for i in range(5):
        await store.add_batch(a_batch(f"batch_{i}", owner="ab"[i % 2], metadata={"k": "v"}))
    ids = lambda found: [b.id[-1] for b in found]  # noqa: E731
    assert ids(await store.list_batches(limit=2)) == list("43")
    assert ids(await store.list_batches(limit=2, after="batch_3")) == list("21")
    assert ids(await store.list_batches(owner="b")) == list("31")
    assert ids(await store.running_batches()) == list("01234")
    assert await store.get_batch("batch_9") is None
    assert (await store.get_batch("batch_1")).metadata == {"k": "v"}


async def test_leases(store):
    await store.add_file(a_file("file-1"))
    for name in ("batch_1", "batch_2"):
        await store.add_batch(a_batch(name))
    now = time.time()
    first, batch = await store.acquire("a", ttl_s=60, now=now, is_dead=NEVER)
    second, _ = await store.acquire("b", ttl_s=60, now=now, is_dead=NEVER)
    assert (first.batch_id, first.fence, batch.status) == ("batch_1", 1, "validating")
    assert second.batch_id == "batch_2"
    assert await store.acquire("c", ttl_s=60, now=now, is_dead=NEVER) is None

    third, _ = await store.acquire("c", ttl_s=60, now=now, is_dead=lambda owner: owner == "b")
    assert (third.batch_id, third.fence) == ("batch_2", 2)
    with pytest.raises(LeaseLostError):
        await store.renew(second, ttl_s=60, now=now)
    await store.release(second)  # a lost lease
    assert await store.acquire("d", ttl_s=60, now=now, batch_id="batch_2", is_dead=NEVER) is None
    await store.release(third)
    fourth, _ = await store.acquire("d", ttl_s=0.05, now=now, batch_id="batch_2", is_dead=NEVER)
    assert fourth.fence == 3
    await asyncio.sleep(0.06)
    fifth, _ = await store.acquire("e", ttl_s=60, now=time.time(), batch_id="batch_2", is_dead=NEVER)
    assert fifth.fence == 4, "a lease expires by itself"
    assert (await store.renew(first, ttl_s=60, now=now)).status == "validating"
    await store.cancel_batch("batch_1", now=3)
    assert (await store.renew(first, ttl_s=60, now=now)).status == "cancelling"


LATE = [
    ("add_lines", lambda s, x: s.add_lines(x, [a_line(9)])),
    ("clear_lines", lambda s, x: s.clear_lines(x)),
    ("fail", lambda s, x: s.fail(x, [], now=1)),
    ("plan", lambda s, x: s.plan(x)),
    ("start", lambda s, x: s.start(x, now=1, model=None)),
    ("add_crashes", lambda s, x: s.add_crashes(x, {1: True})),
    ("commit_results", lambda s, x: s.commit_results(x, [ok(1)])),
    ("finalize", lambda s, x: s.finalize(x, now=1)),
    ("finish", lambda s, x: s.finish(x, output=a_file("file-o"), errors=None, now=1)),
]


@pytest.mark.parametrize(("name", "late"), LATE, ids=[name for name, _ in LATE])
async def test_an_older_runner_changes_nothing(store, name, late):
    await store.add_file(a_file("file-1"))
    await store.add_batch(a_batch("batch_1"))
    old, _ = await store.acquire("a", ttl_s=60, now=time.time(), is_dead=NEVER)
    await store.add_lines(old, [a_line(1)])
    await store.acquire("b", ttl_s=60, now=time.time(), is_dead=lambda _: True)
    before = await store.get_batch("batch_1"), await store.answered("batch_1", after=0, limit=9)
    with pytest.raises(LeaseLostError):
        await late(store, old)
    assert (await store.get_batch("batch_1"), await store.answered("batch_1", after=0, limit=9)) == before
    assert await store.get_file("file-o") is None


async def test_lines_come_in_the_planned_order(store):
    chance = random.Random(3)
    lines = [
        a_line(i, group_key=chance.randint(-(2**63), 2**63 - 1) if i % 3 else i % 7, num_tokens=chance.randint(0, 400))
        for i in range(1, 500)
    ]
    await started(store, lines)
    found, after = [], 0
    while page := await store.pending_lines("batch_1", after=after, limit=70):
        found += page
        after = page[-1].position
    assert [x.number for x in found] == [x.number for x in order(lines)]
    assert [x.position for x in found] == list(range(1, 500))
    assert msgspec.structs.replace(found[0], position=0) in lines


async def test_planning_may_be_repeated(store):
    lease = await started_validating(store, [a_line(i) for i in range(1, 10)])
    await store.plan(lease)
    await store.plan(lease)
    assert len(await store.pending_lines("batch_1", after=0, limit=100)) == 9
    await store.clear_lines(lease)
    assert await store.answered("batch_1", after=0, limit=100) == []
    await store.add_lines(lease, [a_line(1)])


async def started_validating(store, lines) -> Lease:
    await store.add_file(a_file("file-1"))
    await store.add_batch(a_batch("batch_1"))
    lease, _ = await store.acquire("me", ttl_s=60, now=time.time(), is_dead=NEVER)
    await store.add_lines(lease, lines)
    return lease


async def test_duplicates(store):
    ids = ["a", "b", "a", "c", "b", "a", "A", "ä", "a\u0301"]
    lease = await started_validating(store, [a_line(i, custom_id=c) for i, c in enumerate(ids, start=1)])
    found = await store.duplicates(lease, limit=10)
    assert [(x.number, x.custom_id) for x in found] == [(3, "a"), (5, "b"), (6, "a")]
    assert len(await store.duplicates(lease, limit=2)) == 2


async def test_results_are_counted_once(store):
    lease = await started(store, [a_line(i, num_tokens=10) for i in range(1, 6)])
    await store.commit_results(lease, [ok(2, num_prompt_tokens=3, num_cached_tokens=1, num_output_tokens=2)])
    refused = LineResult(number=3, status_code=400, request_id="q", body=b'{"error": 1}')
    dead = LineResult(number=4, error_code="replica_crashed", error_message="It ended.")
    batch = await store.commit_results(lease, [ok(2, num_prompt_tokens=100), refused, dead, ok(5), ok(5, body=b"2")])
    assert (batch.num_lines, batch.num_completed, batch.num_failed, batch.num_answered) == (5, 2, 2, 4)
    assert (batch.num_prompt_tokens, batch.num_cached_tokens, batch.num_output_tokens) == (3, 1, 2)
    assert (batch.estimated_tokens, batch.answered_tokens, batch.remaining_tokens) == (50, 40, 10)
    assert await store.commit_results(lease, [ok(2)]) == batch == await store.get_batch("batch_1")
    assert [x.number for x in await store.pending_lines("batch_1", after=0, limit=9)] == [1]
    results = {line.number: result for line, result in await store.answered("batch_1", after=0, limit=9)}
    assert results == {1: None, 2: results[2], 3: refused, 4: dead, 5: ok(5)}
    assert results[2].num_prompt_tokens == 3
    assert [x.number for x, _ in await store.answered("batch_1", after=3, limit=1)] == [4]


async def test_suspects(store):
    lease = await started(store, [a_line(i) for i in range(1, 6)])
    crashed = await store.add_crashes(lease, {2: False, 4: False})
    assert [(x.number, x.crashes, x.lone_crashes) for x in crashed] == [(2, 1, 0), (4, 1, 0)]
    [crashed] = await store.add_crashes(lease, {4: True})
    assert (crashed.number, crashed.crashes, crashed.lone_crashes) == (4, 2, 1)
    assert [x.number for x in await store.pending_lines("batch_1", after=0, limit=9)] == [1, 3, 5]
    assert [(x.number, x.crashes) for x in await store.suspects("batch_1")] == [(2, 1), (4, 2)]
    await store.commit_results(lease, [ok(4)])
    assert [x.number for x in await store.suspects("batch_1")] == [2]


@pytest.mark.parametrize(
    ("numbers", "is_cancelled", "status", "num_failed"),
    [((1, 2, 3), False, "completed", 0), ((1,), False, "expired", 2), ((1, 2), True, "cancelled", 1)],
)
async def test_how_a_batch_ends(store, numbers, is_cancelled, status, num_failed):
    lease = await started(store, [a_line(i) for i in (1, 2, 3)])
    await store.commit_results(lease, [ok(n) for n in numbers])
    if is_cancelled:
        await store.cancel_batch("batch_1", now=8)
    finalizing = await store.finalize(lease, now=9)
    assert finalizing.status == ("cancelling" if is_cancelled else "finalizing")
    assert await store.finalize(lease, now=11) == finalizing, "it may be repeated"
    if not is_cancelled:
        with pytest.raises(LeaseLostError, match="finalizing"):
            await store.commit_results(lease, [ok(3)])
        assert (await store.cancel_batch("batch_1", now=10)).status == "finalizing", "too late to be cancelled"
    output = a_file("file-output")
    ended = await store.finish(lease, output=output, errors=None, now=12)
    assert (ended.status, ended.num_completed, ended.num_failed) == (status, len(numbers), num_failed)
    assert (ended.output_file_id, ended.error_file_id) == ("file-output", None)
    assert getattr(ended, f"{status}_at") == 12
    assert await store.get_file("file-output") == output
    assert await store.acquire("x", ttl_s=9, now=1e10, is_dead=lambda _: True) is None
    assert await store.unpurged() == ["batch_1"]
    await store.purge("batch_1")
    assert await store.unpurged() == []
    assert await store.get_batch("batch_1") == ended


async def test_purging_keeps_running_batches(store):
    lease = await started(store, [a_line(1)])
    await store.purge("batch_1")
    await store.purge("batch_none")
    assert len(await store.pending_lines(lease.batch_id, after=0, limit=9)) == 1


async def test_batches_do_not_mix(store):
    one = await started(store, [a_line(i) for i in (1, 2)], "batch_1")
    two = await started(store, [a_line(i) for i in (1, 2, 3)], "batch_2")
    await store.commit_results(one, [ok(1)])
    assert (await store.commit_results(two, [ok(1), ok(2)])).num_completed == 2
    assert (await store.get_batch("batch_1")).num_completed == 1
    assert [x.number for x in await store.pending_lines("batch_1", after=0, limit=9)] == [2]


async def test_everything_is_still_there_after_reopening(store, reopen):
    lease = await started(store, [a_line(i) for i in (1, 2)])
    await store.commit_results(lease, [ok(1)])
    before = await store.get_batch("batch_1"), await store.answered("batch_1", after=0, limit=9)
    await store.close()
    await store.close()
    with pytest.raises(StoreError, match="closed"):
        await store.get_batch("batch_1")
    again = reopen()
    assert (await again.get_batch("batch_1"), await again.answered("batch_1", after=0, limit=9)) == before
    await again.close()


async def test_two_stores_of_one_database(store, reopen):
    """Two gateways acquire batches at the same moment: each batch has one runner."""
    other = reopen()
    await store.add_file(a_file("file-1"))
    for i in range(10):
        await store.add_batch(a_batch(f"batch_{i}"))
    takes = [s.acquire(f"o{n}", ttl_s=60, now=time.time(), is_dead=NEVER) for n, s in enumerate([store, other] * 5)]
    taken = [found[0].batch_id for found in await asyncio.gather(*takes) if found is not None]
    assert sorted(taken) == sorted(set(taken))
    assert len(taken) == 10
    await other.close()


async def test_a_whole_batch(store, tmp_path):
    files = FileContents(tmp_path / "files")
    batch = await add_batch(store, files, [*requests(150), request("no", "refuse")])
    executor = SimulatedExecutor(latency_s=0.002, poison=["r17"], capacity=16)
    ended = await run_batch(store, files, executor, batch.id, options=FAST)
    assert (ended.status, ended.num_completed, ended.num_failed) == ("completed", 149, 2)
    assert list(texts(read_lines(files, ended.output_file_id))) == [f"r{i}" for i in range(150) if i != 17]
    assert [x["custom_id"] for x in read_lines(files, ended.error_file_id)] == ["r17", "no"]


def test_a_newer_schema_is_refused(reopen, location):
    asyncio.run(reopen().close())
    _set_version(location, 99)
    with pytest.raises(StoreError, match="newer release"):
        reopen()


def _set_version(location: str, version: int) -> None:
    if location.startswith("postgresql://"):
        import psycopg

        with psycopg.connect(location) as connection:
            connection.execute("UPDATE batch_schema SET version = %s", (version,))
    else:
        import sqlite3

        with sqlite3.connect(location) as connection:
            connection.execute(f"PRAGMA user_version={version}")
        connection.close()


def test_a_store_that_cannot_be_opened(tmp_path):
    (tmp_path / "file").write_text("no database")
    with pytest.raises(StoreError, match="cannot be opened"):
        open_store(tmp_path / "file")
    (tmp_path / "batches.db").write_text("no database at all, but text" * 100)
    with pytest.raises(StoreError, match="cannot be opened"):
        open_store(tmp_path)
    with pytest.raises(StoreError, match="postgresql://"):
        open_store(tmp_path, database_url="mysql://x")
    pytest.importorskip("psycopg")
    with pytest.raises(StoreError, match="cannot be opened"):
        open_store(tmp_path, database_url=f"postgresql://u@/db?host={tmp_path}")


async def test_a_lost_connection_is_opened_again(postgres_url, tmp_path):
    import psycopg

    store = open_store(tmp_path, database_url=postgres_url)
    await store.add_file(a_file("file-1"))
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        ended = connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'tramontane-batches'"
        ).fetchall()
        assert ended
    await store.add_file(a_file("file-2"))
    assert len(await store.list_files()) == 2
    await store.close()
