"""A service runs all batches of a store, shares them with other services, takes over from dead ones, and cleans up."""

import asyncio
import os
import time
from contextlib import asynccontextmanager

from support.batch.batches import FAST, SimulatedExecutor, add_batch, opened, read_lines, request, requests

from cluster.batch.errors import StoreError
from cluster.batch.records import FileRecord
from cluster.batch.run.service import BatchService, ServiceOptions
from cluster.system.process import is_dead, new_owner

QUICK = ServiceOptions(max_batches=3, poll_every_s=0.02, retry_after_s=0.05)


@asynccontextmanager
async def running(*services: BatchService):
    tasks = [asyncio.create_task(service.run()) for service in services]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def until(condition, timeout_s=10.0):
    deadline = time.monotonic() + timeout_s
    while not await condition():
        assert time.monotonic() < deadline, "the condition did not become true"
        await asyncio.sleep(0.01)


def all_ended(store):
    async def ended():
        return not await store.running_batches()

    return ended


async def test_two_services_share_the_batches(tmp_path):
    one, files = opened(tmp_path)
    two, _ = opened(tmp_path)
    batches = [await add_batch(one, files, requests(20)) for _ in range(8)]
    executors = [SimulatedExecutor(latency_s=0.005, capacity=9) for _ in range(2)]
    services = [
        BatchService(store, files, executor, options=FAST, service=QUICK)
        for store, executor in zip((one, two), executors, strict=True)
    ]
    async with running(*services):
        await until(all_ended(one))
    assert {(await one.get_batch(b.id)).num_completed for b in batches} == {20}
    assert sum(len(e.executed) for e in executors) == 8 * 20, "each line was executed once"
    assert all(e.executed for e in executors)
    # A new batch gets its part of the capacity at once; the others shrink to theirs line by line.
    assert all(max(e.in_flight_counts) <= 9 + 9 // 2 + 9 // 3 for e in executors), "batches share the capacity"
    await one.close()
    await two.close()


async def test_poison_of_one_batch_is_not_blamed_on_another(tmp_path):
    """Both have suspects on the same replica, where the poison line would kill any of them."""
    store, files = opened(tmp_path)
    poisoned = await add_batch(store, files, [request("bad"), *requests(20)])
    harmless = await add_batch(store, files, requests(40))
    executor = SimulatedExecutor(latency_s=0.01, capacity=8, poison=["bad"])
    async with running(BatchService(store, files, executor, options=FAST, service=QUICK)):
        await until(all_ended(store))
    assert executor.num_deaths >= 3
    ended = [await store.get_batch(b.id) for b in (poisoned, harmless)]
    assert [(b.num_completed, b.num_failed) for b in ended] == [(20, 1), (40, 0)]
    [line] = read_lines(files, ended[0].error_file_id)
    assert (line["custom_id"], line["error"]["code"]) == ("bad", "replica_crashed")
    await store.close()


async def test_a_cancelled_batch_ends_at_once(tmp_path):
    store, files = opened(tmp_path)
    batch = await add_batch(store, files, requests(50))
    executor = SimulatedExecutor(latency_s=1, capacity=4)
    slow = ServiceOptions(poll_every_s=60)
    service = BatchService(store, files, executor, service=slow)
    async with running(service):
        await until(lambda: _true(executor.executed))
        await store.cancel_batch(batch.id, now=time.time())
        service.wake()
        await until(all_ended(store), 2)
    assert (await store.get_batch(batch.id)).status == "cancelled"
    await store.close()


async def _true(value) -> bool:
    return bool(value)


async def test_a_stopped_service_leaves_its_batches_to_others(tmp_path):
    store, files = opened(tmp_path)
    batch = await add_batch(store, files, requests(60))
    first = SimulatedExecutor(latency_s=0.02, capacity=4)
    async with running(BatchService(store, files, first, service=QUICK)):  # with a lease of many seconds
        await until(lambda: _true(len(first.executed) > 10))
    left = await store.get_batch(batch.id)
    assert 0 < left.num_completed < 60
    second = SimulatedExecutor()
    async with running(BatchService(store, files, second, service=QUICK)):
        await until(all_ended(store), 3)
    assert len(second.executed) == 60 - left.num_completed
    await store.close()


async def test_a_store_that_fails_is_tried_again(tmp_path, caplog):
    store, files = opened(tmp_path)
    batch = await add_batch(store, files, [request("a")])
    files.path(batch.input_file_id).rename(tmp_path / "away")
    failing = _Failing(store, 2)
    async with running(BatchService(failing, files, SimulatedExecutor(), options=FAST, service=QUICK)):
        await until(lambda: _true("does not exist" in caplog.text))
        assert "the disk is gone" in caplog.text
        (tmp_path / "away").rename(files.path(batch.input_file_id))
        await until(all_ended(store))
    assert (await store.get_batch(batch.id)).status == "completed"
    await store.close()


class _Failing:
    """A store whose first `acquire`s fail."""

    def __init__(self, store, num: int) -> None:
        self._store = store
        self._left = num

    async def acquire(self, *args, **kwargs):
        if self._left:
            self._left -= 1
            raise StoreError("the disk is gone.")
        return await self._store.acquire(*args, **kwargs)

    def __getattr__(self, name):
        return getattr(self._store, name)


async def test_the_sweep(tmp_path):
    store, files = opened(tmp_path)
    old = time.time() - 100_000

    async def chunks():
        yield b"x"

    for name, expires_at in (("file-expired", 5), ("file-kept", None)):
        await files.write(name, chunks())
        record = FileRecord(id=name, filename="f", purpose="batch", num_bytes=1, created_at=1, expires_at=expires_at)
        await store.add_file(record)
        os.utime(files.path(name), (old, old))
    files.path("file-stray").write_bytes(b"x")
    os.utime(files.path("file-stray"), (old, old))
    async with running(BatchService(store, files, SimulatedExecutor(), service=QUICK)):
        await until(lambda: _true(not files.path("file-stray").exists()))
    assert [p.name for p in (tmp_path / "files").iterdir()] == ["file-kept"]
    assert [r.id for r in await store.list_files()] == ["file-kept"]
    await store.close()


async def test_owners():
    assert not is_dead(new_owner())
    process = await asyncio.create_subprocess_exec("true")
    await process.wait()
    host, boot, namespace, _, started_at, name = new_owner().split("/")
    assert is_dead("/".join((host, boot, namespace, str(process.pid), started_at, name)))
    reused = "/".join((host, boot, namespace, str(os.getpid()), "1", name))
    assert is_dead(reused), "another process has its id by now"
    for place in (("elsewhere", boot, namespace), (host, "another boot", namespace), (host, boot, "pid:[1]")):
        assert not is_dead("/".join((*place, str(process.pid), "1", name))), f"{place} cannot be seen from here"
