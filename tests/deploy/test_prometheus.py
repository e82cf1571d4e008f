"""A real Prometheus scrapes a real gateway application: the target is up, every expression of the dashboard runs and has its samples.

Skipped without the binaries; on Debian and Ubuntu `apt-get install prometheus` brings both. The replica is a fake one: what is tested is
what stands between the counters and the graph.
"""

import asyncio
import contextlib
import itertools
import json
import math
import re
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from aiohttp import ClientError, ClientSession
from aiohttp.test_utils import TestServer
from support.fakes.replica import FakeReplica, tokens
from support.fakes.router import make_view
from support.paths import ROOT

from cluster.api.app import make_app
from cluster.metrics.gateway import Metrics
from cluster.responses.counts import ResponseCounts
from cluster.router.router import Router
from cluster.text.tokenizer import load_tokenizer

DEPLOY = ROOT / "deploy"
KEY = "a-secret"
SCRAPE_INTERVAL_S = 0.2
READY_TIMEOUT_S = 60.0
NUM_TRIES = 40
needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None or shutil.which("promtool") is None, reason="needs prometheus and promtool"
)


def promtool(*args: str, cwd: Path) -> None:
    done = subprocess.run(["promtool", *args], cwd=cwd, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_prometheus
def test_promtool_accepts_the_configuration_and_the_rules(tmp_path: Path) -> None:
    shutil.copytree(DEPLOY / "prometheus", tmp_path / "prometheus")
    (tmp_path / "prometheus" / "api_key").write_text(KEY)
    promtool("check", "config", "prometheus.yml", cwd=tmp_path / "prometheus")
    promtool("check", "rules", "alerts.yml", cwd=tmp_path / "prometheus")


@needs_prometheus
def test_alerts_fire_when_they_should_and_not_earlier() -> None:
    promtool("test", "rules", "alerts_test.yml", cwd=Path(__file__).parent)


@needs_prometheus
def test_kedas_query_counts_each_replica_once_and_works_without_one(tmp_path: Path) -> None:
    """Two gateways, each of which tells about both replicas: 3 + 5 wait, 40 + 8 run."""
    query = yaml.safe_load((DEPLOY / "helm" / "tramontane" / "values.yaml").read_text())["keda"]["query"]

    def series(name: str, value: int, **labels: str) -> dict[str, str]:
        inside = ",".join(f'{k}="{v}"' for k, v in labels.items())
        return {"series": f"tramontane:{name}{{{inside}}}", "values": f"{value}x3"}

    waiting = [series("num_requests_queued", n, instance=f"g{i}") for i, n in enumerate((3, 5))]
    running = [
        series("num_requests_running", n, instance=f"g{i}", engine=f"r{j}")
        for i in range(2)
        for j, n in enumerate((40, 8))
    ]

    def case(seen: list[dict[str, str]], value: float) -> dict[str, Any]:
        expected = {"expr": query, "eval_time": "1m", "exp_samples": [{"labels": "{}", "value": value}]}
        return {"interval": "1m", "input_series": seen, "promql_expr_test": [expected]}

    (tmp_path / "query.yml").write_text(yaml.safe_dump({"tests": [case(waiting + running, 20), case(waiting, 8)]}))
    promtool("test", "rules", "query.yml", cwd=tmp_path)


@contextlib.asynccontextmanager
async def gateway() -> AsyncIterator[str]:
    """host:port of an application that generates one sequence after another."""
    replica = FakeReplica(tokens([42, 43, 44, 45]), replica_id="r0")
    router = Router([replica])
    num_steps = itertools.count()
    view = lambda: make_view(num_steps=next(num_steps))  # noqa: E731
    metrics = Metrics(router, model_name="demo", view=view, responses=ResponseCounts())
    app = make_app(
        router=router,
        tokenizer=load_tokenizer(ROOT / "examples" / "demo_model"),
        chat_template=None,
        model_name="demo",
        api_key=KEY,
        metrics=metrics,
    )
    server = TestServer(app, host="127.0.0.1")
    await server.start_server()

    async def load(session: ClientSession) -> None:
        while True:
            body = {"model": "demo", "prompt": "Hello", "max_tokens": 4}
            headers = {"Authorization": f"Bearer {KEY}"}
            async with session.post(server.make_url("/v1/completions"), json=body, headers=headers) as response:
                assert response.status == 200, await response.text()
            now = replica.load
            replica.load = msgspec.structs.replace(
                now, prefix_queries_total=now.prefix_queries_total + 2, prefix_hits_total=now.prefix_hits_total + 1
            )
            await asyncio.sleep(0.02)

    async with ClientSession() as session:
        task = asyncio.create_task(load(session))
        try:
            yield f"{server.host}:{server.port}"
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await server.close()


class Prometheus:
    def __init__(self, url: str, session: ClientSession) -> None:
        self.url = url
        self._session = session

    async def get(self, path: str, **params: str) -> Any:
        async with self._session.get(self.url + path, params=params, raise_for_status=True) as response:
            body = await response.json()
            assert body["status"] == "success", f"{path} {params}: {body}"
            return body["data"]

    async def values(self, expression: str) -> list[float]:
        """The current value of every series. Raises for an expression that cannot be evaluated."""
        return [float(row["value"][1]) for row in (await self.get("/api/v1/query", query=expression))["result"]]

    async def targets(self) -> dict[str, tuple[str, str]]:
        """(health, last error) by job."""
        try:
            active = (await self.get("/api/v1/targets", state="active"))["activeTargets"]
        except ClientError:  # it is still starting
            return {}
        return {t["labels"]["job"]: (t["health"], t["lastError"]) for t in active}


@contextlib.asynccontextmanager
async def prometheus(target: str, folder: Path, *, key: str = KEY) -> AsyncIterator[Prometheus]:
    """Runs with the shipped configuration; only the target, the times and the key file differ."""
    shutil.copytree(DEPLOY / "prometheus", folder, dirs_exist_ok=True)
    (folder / "api_key").write_text(key)
    config = yaml.safe_load((folder / "prometheus.yml").read_text())
    config["global"] = dict.fromkeys(config["global"], f"{int(SCRAPE_INTERVAL_S * 1000)}ms")
    (folder / "gateways.yml").write_text(yaml.safe_dump([{"targets": [target]}]))
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    log = folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address={address}",
            ],
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        async with ClientSession() as session:
            server = Prometheus(f"http://{address}", session)
            async with asyncio.timeout(READY_TIMEOUT_S):
                while (await server.targets()).get("tramontane", ("", ""))[0] not in ("up", "down"):
                    assert process.poll() is None, f"prometheus ended:\n{log.read_text()}"
                    await asyncio.sleep(0.05)
            yield server
    finally:
        process.terminate()
        process.wait(20)


@needs_prometheus
async def test_every_panel_has_samples_from_a_real_scrape(tmp_path: Path) -> None:
    dashboard = json.loads((DEPLOY / "grafana" / "dashboards" / "tramontane.json").read_text())
    asked = {
        f"{panel['title']}: {target['expr']}": in_prometheus(target["expr"])
        for panel in dashboard["panels"]
        for target in panel.get("targets", [])
        # There is no Ray, GPU, adapter or certificate here.
        if not re.search("ray_node_|DCGM_|adapter_|tls_", target["expr"])
    }
    async with gateway() as target, prometheus(target, tmp_path) as server:
        assert (await server.targets())["tramontane"] == ("up", ""), "the scrape with the key does not work"
        missing = dict(asked)
        for _ in range(NUM_TRIES):  # rates need a second scrape
            for name, expression in list(missing.items()):
                if any(not math.isnan(value) for value in await server.values(expression)):
                    del missing[name]
            if not missing:
                break
            await asyncio.sleep(SCRAPE_INTERVAL_S)
        assert not missing, f"these have no samples after {NUM_TRIES} scrapes: {sorted(missing)}"
        assert (await server.values("tramontane:time_to_first_token_seconds_count"))[0] > 1
        rules = (await server.get("/api/v1/rules"))["groups"][0]["rules"]
        assert [rule["name"] for rule in rules if rule["health"] == "err"] == []


def in_prometheus(expression: str) -> str:
    """The expression with the values that Grafana would insert for its variables."""
    values = {"${prefix}": "tramontane:", "$model_name": ".*", "$engine": ".*", "$__rate_interval": "2s"}
    for name, value in values.items():
        expression = expression.replace(name, value)
    assert not re.search(r"\$\w", expression), f"{expression} has a variable this test does not know"
    return expression


@needs_prometheus
async def test_with_a_wrong_key_the_target_is_down_and_says_why(tmp_path: Path) -> None:
    async with gateway() as target, prometheus(target, tmp_path, key="wrong") as server:
        health, error = (await server.targets())["tramontane"]
    assert health == "down" and "401" in error, (health, error)
