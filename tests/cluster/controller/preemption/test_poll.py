"""The poller with metadata services that answer as the real ones do, late, wrongly, or not at all."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator

import pytest
from aiohttp import web
from support.fakes.metadata import MACHINE, OTHER_MACHINE, FakeMetadata, azure_event, serving

from cluster.controller.preemption import metadata
from cluster.controller.preemption import poll as poll_module
from cluster.controller.preemption.notices import Notice
from cluster.controller.preemption.poll import NoticePoller, cloud_to_watch
from cluster.protocol.notice import CLOUDS


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for name, seconds in (("AWS_INTERVAL_S", 0.02), ("AZURE_INTERVAL_S", 0.02), ("GCP_WAIT_S", 0.1)):
        monkeypatch.setattr(metadata, name, seconds)
    monkeypatch.setattr(poll_module, "RETRY_S", 0.01)


class World:
    def __init__(self, fake: FakeMetadata, poller: NoticePoller, notices: list[Notice | None]) -> None:
        self.fake, self.poller, self.notices = fake, poller, notices

    async def until(self, condition) -> None:
        async with asyncio.timeout(5):
            while not condition():
                await asyncio.sleep(0.005)

    async def asked_again(self) -> None:
        """Waits until the poller has handled everything set before."""
        count = len(self.fake.asked)
        await self.until(lambda: len(self.fake.asked) > count + 6)


@pytest.fixture(params=CLOUDS)
async def world(request, monkeypatch) -> AsyncIterator[World]:
    fake = FakeMetadata(request.param)
    async with serving(fake) as url:
        monkeypatch.setenv(metadata.METADATA_URL_ENV, url)
        monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
        notices: list[Notice | None] = []
        poller = NoticePoller(request.param, notices.append)
        task = asyncio.create_task(poller.run())
        try:
            yield World(fake, poller, notices)
            assert not task.done(), "the poller ended"
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def test_a_notice_arrives_and_is_withdrawn(world):
    await world.until(lambda: len(world.fake.asked) > 4)
    assert world.notices == []
    announced = time.time()
    world.fake.announce(30.0)
    await world.until(lambda: world.notices)
    (notice,) = world.notices
    assert notice.cloud == world.fake.cloud
    assert notice.deadline == pytest.approx(announced + 30.0, abs=2.0)
    assert notice.message.endswith(".")
    await world.until(lambda: world.poller.notice is not None)
    world.fake.withdraw()
    await world.until(lambda: len(world.notices) == 2)
    assert world.notices[1] is None


async def test_the_same_notice_again_is_not_a_change(world):
    world.fake.announce(100.0)
    await world.until(lambda: world.notices)
    if world.fake.cloud == "gcp":
        world.fake.change(time.time() + 50.0)  # another attribute of the machine has changed
    await world.until(lambda: len(world.fake.asked) > 10 or world.fake.cloud == "gcp")
    assert len(world.notices) == 1


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
async def test_an_invalid_answer_changes_nothing_and_is_retried(world, answer):
    world.fake.announce(60.0)
    await world.until(lambda: world.notices)
    world.fake.broken = answer
    if world.fake.cloud == "gcp":
        world.fake.change(time.time() + 60.0)  # ends the long poll
    await world.until(lambda: world.fake.asked.count(world.fake.asked[-1]) > 6)
    assert len(world.notices) == 1, "an invalid answer withdrew the notice"
    world.fake.broken = None
    world.fake.withdraw()
    await world.until(lambda: world.notices[-1] is None)


async def test_a_slow_service_is_waited_for(world):
    world.fake.delay_s = 0.2
    world.fake.announce(60.0)
    await world.until(lambda: world.notices)


@pytest.mark.parametrize("world", ["aws"], indirect=True)
async def test_an_expired_token_is_fetched_again(world):
    await world.until(lambda: world.fake.tokens)
    world.fake.tokens = {"another session's"}
    world.fake.announce(60.0)
    await world.until(lambda: world.notices)
    assert world.fake.asked.count("/latest/api/token") == 2


@pytest.mark.parametrize("world", ["azure"], indirect=True)
async def test_events_for_other_machines_of_a_scale_set_are_ignored(world):
    world.fake.events_of_others = [azure_event("Preempt", OTHER_MACHINE, "Tue, 24 Nov 2026 08:20:30 GMT")]
    await world.asked_again()
    assert world.notices == []
    world.fake.events_of_others = [azure_event("Preempt", MACHINE, "Tue, 24 Nov 2026 08:20:30 GMT")]
    await world.until(lambda: world.notices)


@pytest.mark.parametrize("cloud", CLOUDS)
async def test_a_silent_service_is_logged_once(cloud, monkeypatch, caplog, unused_tcp_port):
    monkeypatch.setenv(metadata.METADATA_URL_ENV, f"http://127.0.0.1:{unused_tcp_port}")
    now = [0.0]
    poller = NoticePoller(cloud, lambda notice: None, clock=lambda: now[0])
    caplog.set_level(logging.DEBUG, logger="cluster.controller.preemption.poll")
    task = asyncio.create_task(poller.run())
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


def test_the_cloud_to_watch(monkeypatch):
    monkeypatch.setattr(poll_module, "find_cloud", lambda: "gcp")
    assert [cloud_to_watch(option) for option in ("auto", "aws", "off")] == ["gcp", "aws", None]
    monkeypatch.setattr(poll_module, "find_cloud", lambda: None)
    assert cloud_to_watch("auto") is None
