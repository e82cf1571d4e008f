"""When a batch command stops waiting for replicas, and what it says then."""

import asyncio
from contextlib import asynccontextmanager

import pytest
from support.batch.batches import add_batch, opened, requests
from support.fakes.replica import FakeReplica

from cluster.cli.batch.watch import SILENCE_S, Watch
from cluster.protocol.view import ClusterView, StartFailure
from cluster.router.router import Availability, Router


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@asynccontextmanager
async def watching(folder, router: Router, clock: Clock):
    store, files = opened(folder)
    batch = await add_batch(store, files, requests(3))
    watch = Watch(store, batch.id, has_deadline=True, clock=clock, poll_every_s=0.01)
    task = asyncio.create_task(watch.run(router))
    await asyncio.sleep(0)  # it has started
    try:
        yield watch
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await store.close()


def view(**fields) -> ClusterView:
    return ClusterView(version=1, controller_id="c", **fields)


async def test_a_silent_ray_has_ended(tmp_path, clock):
    router = Router()
    async with watching(tmp_path, router, clock) as watch:
        watch.on_view(view())
        clock.now += SILENCE_S / 2
        await asyncio.sleep(0.05)
        assert not watch.failed.done()
        clock.now += SILENCE_S
        async with asyncio.timeout(5):
            error = await watch.failed
    assert watch.ray_is_gone
    assert str(error).startswith("Ray's head has not answered for 20 s")


async def test_a_working_replica_needs_no_head(tmp_path, clock):
    replica = FakeReplica()
    router = Router([replica])
    async with watching(tmp_path, router, clock) as watch:
        clock.now += 10 * SILENCE_S
        await asyncio.sleep(0.05)
        assert not watch.failed.done()
        router.update([], Availability())
        async with asyncio.timeout(5):
            await watch.failed


async def test_replicas_that_cannot_start_are_the_reason(tmp_path, clock):
    async with watching(tmp_path, Router(), clock) as watch:
        watch.on_view(view(failure=StartFailure(kind="config", message="No place was found.")))
        async with asyncio.timeout(5):
            assert str(await watch.failed) == "No place was found."
    assert not watch.ray_is_gone
