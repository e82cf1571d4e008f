"""The watcher against metadata services that answer as the real ones do, late, wrongly, or not at all."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator

import pytest
from aiohttp import web
from support.fakes.metadata import MACHINE, OTHER_MACHINE, FakeMetadata, azure_event, serving

from cluster.controller.preemption import metadata
from cluster.controller.preemption import poll as notice_watcher
from cluster.controller.preemption.notices import Notice
from cluster.controller.preemption.poll import NoticeWatcher, cloud_to_watch
from cluster.protocol.notice import CLOUDS


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for name, seconds in (("AWS_INTERVAL_S", 0.02), ("AZURE_INTERVAL_S", 0.02), ("GCP_WAIT_S", 0.1)):
        monkeypatch.setattr(metadata, name, seconds)
    monkeypatch.setattr(notice_watcher, "RETRY_S", 0.01)


class World:
    def __init__(self, fake: FakeMetadata, watcher: NoticeWatcher, told: list[Notice | None]) -> None:
        self.fake, self.watcher, self.told = fake, watcher, told

    async def until(self, condition) -> None:
        async with asyncio.timeout(5):
            while not condition():
                await asyncio.sleep(0.005)

    async def asked_again(self) -> None:
        """Whatever it was told before this, it has taken in afterwards."""
        count = len(self.fake.asked)
        await self.until(lambda: len(self.fake.asked) > count + 6)


@pytest.fixture(params=CLOUDS)
async def world(request, monkeypatch) -> AsyncIterator[World]:
    fake = FakeMetadata(request.param)
    async with serving(fake) as url:
        monkeypatch.setenv(metadata.METADATA_URL_ENV, url)
        monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
        told: list[Notice | None] = []
        watcher = NoticeWatcher(request.param, told.append)
        task = asyncio.create_task(watcher.run())
        try:
            yield World(fake, watcher, told)
            assert not task.done(), "nobody watches any more"
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def test_a_notice_comes_and_is_withdrawn(world):
    await world.until(lambda: len(world.fake.asked) > 4)
    assert world.told == []
    announced = time.time()
    world.fake.announce(30.0)
    await world.until(lambda: world.told)
    (notice,) = world.told
    assert notice.cloud == world.fake.cloud
    assert notice.deadline == pytest.approx(announced + 30.0, abs=2.0)
    assert notice.sentence.endswith(".")
    await world.until(lambda: world.watcher.notice is not None)
    world.fake.withdraw()
    await world.until(lambda: len(world.told) == 2)
    assert world.told[1] is None


async def test_asked_again_the_same_notice_is_no_news(world):
    world.fake.announce(100.0)
    await world.until(lambda: world.told)
    if world.fake.cloud == "gcp":
        world.fake._set(time.time() + 50.0)  # something else about the machine has changed
    await world.until(lambda: len(world.fake.asked) > 10 or world.fake.cloud == "gcp")
    assert len(world.told) == 1


@pytest.mark.parametrize(
    "answer",
    [
        web.Response(status=500, text="oops"),
        web.Response(status=200, text="<html>captive portal</html>"),
        web.Response(status=302, text=""),
        web.Response(status=200, text="x" * 300_000),
    ],
    ids=["500", "garbage", "redirect", "endless"],
)
async def test_a_service_that_is_unwell_means_nothing_and_is_asked_again(world, answer):
    world.fake.announce(60.0)
    await world.until(lambda: world.told)
    world.fake.broken = answer
    if world.fake.cloud == "gcp":
        world.fake._set(time.time() + 60.0)  # ends the long poll
    await world.until(lambda: world.fake.asked.count(world.fake.asked[-1]) > 6)
    assert len(world.told) == 1, "no answer is no withdrawal"
    world.fake.broken = None
    world.fake.withdraw()
    await world.until(lambda: world.told[-1] is None)


async def test_a_slow_service_is_waited_for(world):
    world.fake.delay_s = 0.2
    world.fake.announce(60.0)
    await world.until(lambda: world.told)


@pytest.mark.parametrize("world", ["aws"], indirect=True)
async def test_a_token_that_has_run_out_is_asked_for_again(world):
    await world.until(lambda: world.fake.tokens)
    world.fake.tokens = {"another session's"}
    world.fake.announce(60.0)
    await world.until(lambda: world.told)
    assert world.fake.asked.count("/latest/api/token") == 2


@pytest.mark.parametrize("world", ["azure"], indirect=True)
async def test_a_scale_sets_other_machines_are_not_this_one(world):
    world.fake.events_of_others = [azure_event("Preempt", OTHER_MACHINE, "Tue, 24 Nov 2026 08:20:30 GMT")]
    await world.asked_again()
    assert world.told == []
    world.fake.events_of_others = [azure_event("Preempt", MACHINE, "Tue, 24 Nov 2026 08:20:30 GMT")]
    await world.until(lambda: world.told)


@pytest.mark.parametrize("cloud", CLOUDS)
async def test_where_nothing_answers_it_is_said_once(cloud, monkeypatch, caplog, unused_tcp_port):
    monkeypatch.setenv(metadata.METADATA_URL_ENV, f"http://127.0.0.1:{unused_tcp_port}")
    now = [0.0]
    watcher = NoticeWatcher(cloud, lambda notice: None, clock=lambda: now[0])
    caplog.set_level(logging.DEBUG, logger="cluster.controller.preemption.poll")
    task = asyncio.create_task(watcher.run())
    try:
        async with asyncio.timeout(5):
            while len(caplog.records) < 4:
                await asyncio.sleep(0.005)
            assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
            now[0] = 40.0
            while len(caplog.records) < 12:
                await asyncio.sleep(0.005)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    warnings = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert "--preemption-notices off" in warnings[0]


def test_whom_to_ask(monkeypatch):
    monkeypatch.setattr(notice_watcher, "find_cloud", lambda: "gcp")
    assert [cloud_to_watch(asked) for asked in ("auto", "aws", "off")] == ["gcp", "aws", None]
    monkeypatch.setattr(notice_watcher, "find_cloud", lambda: None)
    assert cloud_to_watch("auto") is None
