"""The registry as Ray gauges: pure against a recording gauge, and once through a real Ray's own endpoint."""

import asyncio
import os
import subprocess
import sys
from typing import Any

import pytest
from support.fakes.router import LOAD, FakeRouter, make_view
from support.paths import ROOT

from cluster.metrics.gateway import Metrics
from cluster.ray_runtime.metrics import GaugeMirror, RayMetrics, publish_forever

REAL_RAY = """
import asyncio, time, urllib.request, ray
from support.fakes.router import FakeRouter, make_view
from cluster.metrics.gateway import Metrics
from cluster.ray_runtime.metrics import RayMetrics, publish_rank

ray.init(num_cpus=1, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False)

@ray.remote(num_cpus=0)
class Rank:
    def start(self):
        publish_rank("r0", 1, lambda: make_view().replicas[0].ranks[1].stats)

rank = Rank.remote()
ray.get(rank.start.remote())
metrics = RayMetrics(Metrics(FakeRouter(), model_name="m", view=make_view).registry)
wanted = ("ray_tramontane_kv_cache_usage_perc{", "ray_tramontane_time_to_first_token_seconds_bucket{",
          "ray_tramontane_rank_step_seconds_total{")
node = ray.nodes()[0]
deadline = time.monotonic() + 40
text = ""
while not all(name in text for name in wanted) and time.monotonic() < deadline:
    asyncio.run(metrics.push())  # again, as the gateway does: Ray may lose what it gets while it starts
    try:
        with urllib.request.urlopen(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics") as r:
            text = r.read().decode()
    except OSError:
        pass
    time.sleep(0.2)
print(text)
"""


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


@pytest.mark.system
def test_rays_own_endpoint_shows_them() -> None:
    settings = {"RAY_metrics_report_interval_ms": "500", "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
    done = subprocess.run(
        [sys.executable, "-c", REAL_RAY],
        env={**os.environ, **settings, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("ray_tramontane_")]
    for name, labels, value in (
        ("kv_cache_usage_perc", ('engine="r0"', 'model_name="m"'), 0.25),
        ("time_to_first_token_seconds_bucket", ('le="+Inf"',), 0.0),
        ("rank_step_seconds_total", ('engine="r0"', 'rank="1"'), 0.2),
    ):
        found = [
            line for line in lines if line.startswith(f"ray_tramontane_{name}{{") and all(x in line for x in labels)
        ]
        assert [float(line.split()[-1]) for line in found] == [value], f"{name}: {found} among {len(lines)} series"


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
