"""The registry as Ray gauges, against a recording gauge. A real Ray's own endpoint: tests/system/test_serve.py."""

import asyncio
from typing import Any

import pytest
from support.fakes.router import LOAD, FakeRouter, make_view

from cluster.metrics.gateway import Metrics
from cluster.ray_runtime.metrics import GaugeMirror, RayMetrics, publish_forever


class RecordingGauge:
    made: dict[str, "RecordingGauge"]

    def __init__(self, name: str, text: str, tag_keys: tuple[str, ...]) -> None:
        assert ":" not in name, "Ray warns about colons and will refuse them"
        self.made[name] = self
        self.tag_keys = tag_keys
        self.values: dict[tuple[str, ...], float] = {}

    def set(self, value: float, tags: dict[str, str]) -> None:
        assert set(tags) == set(self.tag_keys), "Ray refuses tags that were not declared"
        self.values[tuple(tags[key] for key in self.tag_keys)] = value


@pytest.fixture
def gauges() -> type[RecordingGauge]:
    return type("Gauge", (RecordingGauge,), {"made": {}})


async def test_every_sample_has_its_gauge(gauges: Any) -> None:
    metrics = Metrics(FakeRouter(), model_name="m", view=make_view)
    metrics.time_to_first_token.observe(0.3)
    await RayMetrics(metrics.registry, mirror=GaugeMirror(gauges)).push()
    made = gauges.made
    assert made["tramontane_num_requests_running"].values == {("m", "r0"): 3, ("m", "r1"): 0}
    assert made["tramontane_num_preemptions_total"].values[("m", "r0")] == 1
    buckets = made["tramontane_time_to_first_token_seconds_bucket"].values
    assert (buckets[("m", "0.25")], buckets[("m", "0.5")], buckets[("m", "+Inf")]) == (0, 1, 1)
    assert made["tramontane_time_to_first_token_seconds_sum"].values == {("m",): 0.3}
    wrong = [name for name in made if "_created" in name or "rank_" in name]
    assert wrong == [], "ranks publish their own, and the time a counter was made is of no use"


async def test_series_of_an_ended_replica_become_zero_and_come_back(gauges: Any) -> None:
    router = FakeRouter()
    push = RayMetrics(Metrics(router, model_name="m").registry, mirror=GaugeMirror(gauges)).push
    await push()
    router.loads = {"r1": LOAD}
    await push()
    running = gauges.made["tramontane_num_requests_running"].values
    assert running == {("m", "r0"): 0, ("m", "r1"): 3}, "Ray would show the replica that ended forever"
    router.loads = {"r0": LOAD}
    await push()
    assert running == {("m", "r0"): 3, ("m", "r1"): 0}


async def test_a_push_that_fails_is_logged_and_retried(caplog: pytest.LogCaptureFixture) -> None:
    class Registry:
        num_asked = 0

        def collect(self) -> list[Any]:
            self.num_asked += 1
            if self.num_asked == 1:
                raise RuntimeError("the router is being rebuilt")
            again.set()
            return []

    again = asyncio.Event()
    task = asyncio.create_task(publish_forever(Registry(), interval_s=0.001))
    try:
        async with asyncio.timeout(10):
            await again.wait()
    finally:
        task.cancel()
    assert "could not be pushed to Ray: the router is being rebuilt" in caplog.text
