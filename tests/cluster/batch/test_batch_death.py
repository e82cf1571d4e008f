"""What a batch survives: death at any moment, a full disk, a read-only folder, two runners, a runner that was paused.

Afterwards each custom_id occurs exactly once over output and error file, and the answers are those of an undisturbed batch.
"""

import asyncio
import os
import signal
import sqlite3
import sys
import time
from collections import Counter
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from support.batch.batches import FAST, SimulatedExecutor, add_batch, opened, read_lines, request, requests, texts
from support.paths import ROOT

from cluster.batch.errors import LeaseLostError, StoreError
from cluster.batch.files import FileContents
from cluster.batch.records import Line, LineResult, line_seed
from cluster.batch.run.runner import BatchRunner, run_batch
from cluster.batch.store.open import open_files, open_store
from cluster.system.process import is_dead, new_owner

CHILD = ROOT / "tests" / "support" / "batch" / "child.py"
BATCH_ID = "batch_of_a_test"
NUM_LINES = 400


def inputs() -> list[bytes]:
    return [*requests(NUM_LINES - 3), *(request(f"refused-{i}", "refuse") for i in range(3))]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, str]:
    async def run() -> dict[str, str]:
        store, files = opened(tmp_path_factory.mktemp("undisturbed"))
        await add_batch(store, files, inputs(), batch_id=BATCH_ID)
        ended = await run_batch(store, files, SimulatedExecutor(), BATCH_ID, options=FAST)
        await store.close()
        return texts(read_lines(files, ended.output_file_id))

    found = asyncio.run(run())
    assert len(found) == NUM_LINES - 3
    return found


@asynccontextmanager
async def child(folder: Path, *arguments: str):
    """A process that runs the batch; it is killed at the end of the block."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(CHILD), str(folder), BATCH_ID, *arguments, stdout=asyncio.subprocess.PIPE, env=environment
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def said(process) -> str:
    out, _ = await asyncio.wait_for(process.communicate(), 30)
    return out.decode().strip()


async def check_exactly_once(folder: Path, undisturbed: dict[str, str], *, database_url: str | None = None) -> None:
    store, files = open_store(folder, database_url=database_url), open_files(folder)
    batch = await store.get_batch(BATCH_ID)
    output, errors = read_lines(files, batch.output_file_id), read_lines(files, batch.error_file_id)
    assert (batch.status, batch.num_completed, batch.num_failed) == ("completed", NUM_LINES - 3, 3)
    assert texts(output) == undisturbed
    assert [x["custom_id"] for x in errors] == [f"refused-{i}" for i in range(3)]
    assert {p.name for p in (folder / "files").iterdir() if not p.name.endswith(".tmp")} == {
        batch.input_file_id,
        batch.output_file_id,
        batch.error_file_id,
    }
    assert await store.unpurged() == []
    await store.close()


async def test_killed_at_random_moments(tmp_path, undisturbed):
    """Lives last from nothing to about a whole run, so that deaths hit every phase."""
    deaths: list[str] = []
    for seed in range(50):
        folder = tmp_path / str(seed)
        store, files = opened(folder)
        await add_batch(store, files, inputs(), batch_id=BATCH_ID)
        await store.close()
        async with child(folder, "--lives", str(seed)) as process:
            *killed, end = (await said(process)).splitlines()
        assert end == "completed"
        deaths += [line.removeprefix("killed: ") for line in killed]
        await check_exactly_once(folder, undisturbed)
        if len(deaths) >= 50:
            break
    assert len(deaths) >= 50
    assert {"validating", "in_progress"} <= set(deaths), Counter(deaths)


async def test_killed_while_using_a_database_server(tmp_path, undisturbed, postgres_url):
    """The server rolls back the open transactions of a dead process."""
    store = open_store(tmp_path, database_url=postgres_url)
    await add_batch(store, open_files(tmp_path), inputs(), batch_id=BATCH_ID)
    await store.close()
    async with child(tmp_path, "--lives", "1", "--life-s", "0.2", "--database-url", postgres_url) as process:
        *killed, end = (await said(process)).splitlines()
    assert (end, bool(killed)) == ("completed", True)
    await check_exactly_once(tmp_path, undisturbed, database_url=postgres_url)


async def test_an_answer_is_stored_once_and_only_under_the_newest_lease(tmp_path):
    """The first answer stands; an older lease stores nothing at all."""
    store, files = opened(tmp_path)
    batch = await add_batch(store, files, requests(5))
    first_lease = await _started(store, batch)
    taken = await store.acquire("other", ttl_s=60, now=time.time() + 3600, is_dead=is_dead)
    assert taken is not None, "its lease has expired, so another runner takes over"
    newer, _ = taken
    assert newer.fence == first_lease.fence + 1
    with pytest.raises(LeaseLostError):
        await store.commit_results(first_lease, [LineResult(number=1, status_code=200, body=b"1")])
    with pytest.raises(LeaseLostError):
        await store.add_crashes(first_lease, {1: True})
    with pytest.raises(LeaseLostError):
        await store.finalize(first_lease, now=0)
    first = await store.commit_results(newer, [LineResult(number=1, status_code=200, body=b"1")])
    again = await store.commit_results(newer, [LineResult(number=1, status_code=200, body=b"2")])
    assert (first.num_completed, again.num_completed) == (1, 1)
    [(_, result)] = await store.answered(batch.id, after=0, limit=1)
    assert result.body == b"1"
    await store.close()


async def _started(store, batch):
    """The lease of a live runner that has validated and started the batch."""
    lease, _ = await store.acquire(new_owner(), ttl_s=60, now=time.time(), batch_id=batch.id, is_dead=is_dead)
    await store.add_lines(lease, [Line(number=n, custom_id=f"r{n}", offset=0, num_bytes=1) for n in range(1, 6)])
    await store.plan(lease)
    await store.start(lease, now=time.time(), model="demo")
    return lease


async def test_a_runner_that_was_paused_stores_nothing(tmp_path, undisturbed):
    store, files = opened(tmp_path)
    await add_batch(store, files, inputs(), batch_id=BATCH_ID)
    async with child(tmp_path, "--latency-s", "0.03", "--lease-ttl-s", "0.8") as process:
        while (await store.get_batch(BATCH_ID)).num_completed < 20:
            await asyncio.sleep(0.005)
        process.send_signal(signal.SIGSTOP)
        while _is_locked(tmp_path / "batches.db"):  # it was paused in a transaction and would keep the file locked
            process.send_signal(signal.SIGCONT)
            await asyncio.sleep(0.003)
            process.send_signal(signal.SIGSTOP)
        deadline = time.monotonic() + 20
        while (taken := await _try_to_acquire(store)) is None:
            assert time.monotonic() < deadline, "the lease of the paused runner never expired"
            await asyncio.sleep(0.05)
        executor = SimulatedExecutor(latency_s=0.005, capacity=8)
        task = asyncio.create_task(BatchRunner(store, files, executor, options=FAST).run(*taken))
        while not executor.executed:
            await asyncio.sleep(0.002)
        process.send_signal(signal.SIGCONT)  # while its successor is working
        assert await said(process) == "lease lost"
        assert (await asyncio.wait_for(task, 20)).status == "completed"
    await store.close()
    await check_exactly_once(tmp_path, undisturbed)


async def _try_to_acquire(store):
    return await store.acquire(new_owner(), ttl_s=30, now=time.time(), batch_id=BATCH_ID, is_dead=is_dead)


def _is_locked(path: Path) -> bool:
    connection = sqlite3.connect(path, timeout=0.05, isolation_level=None)
    try:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("ROLLBACK")
    except sqlite3.OperationalError:
        return True
    finally:
        connection.close()
    return False


async def test_a_dead_owner_is_detected_at_once(tmp_path):
    store, files = opened(tmp_path)
    await add_batch(store, files, inputs(), batch_id=BATCH_ID)
    async with child(tmp_path, "--latency-s", "1", "--lease-ttl-s", "600"):
        while (await store.get_batch(BATCH_ID)).status != "in_progress":
            await asyncio.sleep(0.01)
        assert await _try_to_acquire(store) is None, "its owner is alive"
    assert await _try_to_acquire(store) is not None
    await store.close()


class _FailingFile:
    """Accepts this many bytes, then fails like a full disk."""

    def __init__(self, path: Path, num_bytes: int) -> None:
        self._file = path.open("xb", buffering=0)
        self._left = num_bytes

    def write(self, data: bytes) -> int:
        fits = data[: self._left]
        self._file.write(fits)
        self._left -= len(fits)
        if len(fits) < len(data):
            raise OSError(28, "No space left on device")
        return len(data)

    def __getattr__(self, name: str):
        return getattr(self._file, name)


async def test_the_disk_is_full_at_any_byte_of_the_output(tmp_path):
    """Each attempt gets a few bytes further. No partial file ever appears, and the final output is the same as without failures."""
    store, files = opened(tmp_path)
    batch = await add_batch(store, files, [request(f"r{i}") for i in range(4)] + [request("no", "refuse")])
    failures = 0
    for limit in range(0, 100_000, 37):
        tight = FileContents(tmp_path / "files", open_new=lambda path, n=limit: _FailingFile(path, n))
        try:
            ended = await run_batch(store, tight, SimulatedExecutor(), batch.id, options=FAST)
        except StoreError as e:
            failures += 1
            assert "No space left on device" in str(e)
            kept = await store.get_batch(batch.id)
            assert (kept.status, kept.num_completed, kept.num_failed) == ("finalizing", 4, 1)
            assert not list((tmp_path / "files").glob("*.tmp"))
            continue
        break
    assert failures > 20
    output = read_lines(files, ended.output_file_id)
    assert [line["custom_id"] for line in output] == ["r0", "r1", "r2", "r3"]
    assert [line["custom_id"] for line in read_lines(files, ended.error_file_id)] == ["no"]
    assert len(list((tmp_path / "files").iterdir())) == 3, "files of failed attempts are removed"
    await store.close()


async def test_a_cut_temporary_file_is_not_used(tmp_path, undisturbed):
    """A crash during a write leaves part of a file under its temporary name."""
    store, files = opened(tmp_path)
    await add_batch(store, files, inputs(), batch_id=BATCH_ID)
    tight = FileContents(tmp_path / "files", open_new=lambda path: _FailingFile(path, 5000))
    with pytest.raises(StoreError):
        await run_batch(store, tight, SimulatedExecutor(), BATCH_ID, options=FAST)
    left = tmp_path / "files" / "file-x.123.tmp"
    left.write_bytes(b'{"id": "batch_req_1", "cust')
    os.utime(left, (0, 0))
    await run_batch(store, files, SimulatedExecutor(), BATCH_ID, options=FAST)
    assert await files.strays() == []
    assert not left.exists(), "swept"
    await store.close()
    await check_exactly_once(tmp_path, undisturbed)


@pytest.mark.parametrize("limit", [60_000, 150_000])
async def test_a_full_disk_is_a_clear_error(tmp_path, undisturbed, limit):
    """No file of the process may grow larger than `limit`: the database, its log or the output fails, as on a full disk."""
    store, files = opened(tmp_path)
    await add_batch(store, files, inputs(), batch_id=BATCH_ID)
    await store.close()
    async with child(tmp_path, "--latency-s", "0", "--file-limit", str(limit)) as process:
        message = await said(process)
    assert message.startswith("failed: "), message
    assert "cannot be" in message
    async with child(tmp_path) as process:
        assert await said(process) == "completed"
    await check_exactly_once(tmp_path, undisturbed)


async def test_the_output_folder_cannot_be_written(tmp_path, undisturbed):
    """The folder of files becomes read-only, as after a disk error."""
    store, files = opened(tmp_path)
    await add_batch(store, files, inputs(), batch_id=BATCH_ID)

    def fail(path: Path):
        raise OSError(30, "Read-only file system")

    blocked = FileContents(tmp_path / "files", open_new=fail)
    with pytest.raises(StoreError, match="Read-only file system"):
        await run_batch(store, blocked, SimulatedExecutor(), BATCH_ID, options=FAST)
    assert (await store.get_batch(BATCH_ID)).num_completed == NUM_LINES - 3
    executor = SimulatedExecutor()
    await run_batch(store, files, executor, BATCH_ID, options=FAST)
    assert executor.executed == [], "all lines were answered before"
    await store.close()
    await check_exactly_once(tmp_path, undisturbed)
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="cannot be created"):
        FileContents(tmp_path / "file" / "files")


async def test_the_input_file_is_missing(tmp_path):
    store, files = opened(tmp_path)
    batch = await add_batch(store, files, inputs())
    files.path(batch.input_file_id).rename(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match="does not exist"):
        await run_batch(store, files, SimulatedExecutor(), batch.id, options=FAST)
    (tmp_path / "elsewhere").rename(files.path(batch.input_file_id))
    assert (await run_batch(store, files, SimulatedExecutor(), batch.id, options=FAST)).status == "completed"
    await store.close()


def test_seeds_differ_by_line_and_batch():
    seeds = {line_seed(b, c) for b in ("batch_1", "batch_2") for c in ("a", "b")}
    assert len(seeds) == 4
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert line_seed("batch_1", "a") == line_seed("batch_1", "a")
