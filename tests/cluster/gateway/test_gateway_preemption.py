"""A gateway on a preempted node, as its clients see it: not ready, then closed, then ended, each with a reason."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
from aiohttp.test_utils import TestClient, TestServer
from support.fakes.replica import FakeReplica, tokens
from support.paths import DEMO_MODEL

from cluster.api.app import make_app
from cluster.gateway.preemption import PreemptionShutdown, Stage, notice_for, stage_of
from cluster.protocol.view import ClusterView, GatewayRecord, NodeNotice
from cluster.router.router import Router
from cluster.text.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer(DEMO_MODEL)
NOW = 1_800_000_000.0
NOTICE = NodeNotice(
    node_id="here",
    node_ip="10.0.0.2",
    is_head=False,
    source="gcp",
    cause="Google Cloud preempts this machine.",
    deadline=NOW + 30,
    seen_at=NOW,
)
GATEWAYS = tuple(
    GatewayRecord(gateway_id=f"g-{node}", url="", node_id=node, num_running=0, num_queued=0)
    for node in ("here", "there")
)
VIEW = ClusterView(version=1, controller_id="c", gateways=GATEWAYS)
BODY = {"model": "demo", "prompt": list(range(3, 23)), "stream": True}


@pytest.mark.parametrize(
    ("left_s", "stage"),
    [
        (30, Stage.NOT_READY),
        (15.1, Stage.NOT_READY),
        (15, Stage.CLOSED),
        (3.1, Stage.CLOSED),
        (3, Stage.ENDED),
        (-60, Stage.ENDED),
    ],
)
def test_stages(left_s, stage):
    assert stage_of(replace(NOTICE, deadline=NOW + left_s), NOW) is stage


def test_without_a_notice_it_is_open():
    assert stage_of(None, NOW) is Stage.OPEN


@pytest.mark.parametrize(
    ("notices", "gateway", "expected"),
    [
        ((), "g-here", None),
        ((NOTICE,), "g-here", NOTICE),
        ((NOTICE,), "g-there", None),
        ((NOTICE,), "g-unknown", None),
        ((replace(NOTICE, node_id="head", is_head=True),), "g-there", replace(NOTICE, node_id="head", is_head=True)),
        (
            (NOTICE, replace(NOTICE, is_head=True, deadline=NOW + 5)),
            "g-here",
            replace(NOTICE, is_head=True, deadline=NOW + 5),
        ),
        ((replace(NOTICE, deadline=NOW + 3600),), "g-here", None),
    ],
)
def test_which_notice_applies_to_a_gateway(notices, gateway, expected):
    assert notice_for(replace(VIEW, notices=notices), gateway, NOW) == expected


class World:
    def __init__(self, client: TestClient, router: Router) -> None:
        self.client, self.router = client, router
        self.now = NOW
        self.view: ClusterView | None = None
        self.shutdown = PreemptionShutdown(router, lambda: self.view, "g-here", clock=lambda: self.now)

    def say(self, *notices: NodeNotice, at: float = NOW) -> None:
        self.view, self.now = replace(VIEW, notices=notices), at
        self.shutdown.poll()

    async def health(self) -> tuple[int, str | None]:
        async with self.client.get("/health/ready") as response:
            return response.status, (await response.json())["reason"]


@contextlib.asynccontextmanager
async def world(replica: FakeReplica) -> AsyncIterator[World]:
    router = Router([replica])
    app = make_app(router=router, tokenizer=TOKENIZER, chat_template=None, model_name="demo")
    async with TestClient(TestServer(app)) as client:
        yield World(client, router)


async def test_all_stages_from_the_notice_to_the_end():
    replica = FakeReplica(tokens(range(100, 120)), hold_after=3)
    async with world(replica) as w:
        w.shutdown.poll()
        assert (await w.health())[0] == 200, "before the first view there is no notice"
        w.say()
        async with w.client.get("/health/live") as response:
            assert "Connection" not in response.headers

        w.say(NOTICE)
        status, reason = await w.health()
        assert (status, reason) == (503, "This server shuts down at 08:00:30 UTC: Google Cloud preempts this machine.")
        streamed = await w.client.post("/v1/completions", json=BODY)
        assert streamed.status == 200, "load balancers send nothing more, but requests that arrive are served"
        assert streamed.headers["Connection"] == "close"

        w.say(NOTICE, at=NOW + 20)
        async with w.client.post("/v1/completions", json=BODY) as refused:
            assert refused.status == 503
            assert refused.headers["Retry-After"]
            assert "shuts down at" in (await refused.json())["error"]["message"]

        w.say(NOTICE, at=NOW + 27.5)
        async with asyncio.timeout(5):
            last = json.loads((await streamed.text()).strip().rsplit("data: ", 1)[1])
        assert last["error"]["code"] == "server_leaving"
        assert "Send it again" in last["error"]["message"]
        assert w.router.num_inflight_requests == 0


async def test_a_withdrawn_notice_opens_the_gateway_again():
    async with world(FakeReplica(tokens([100]))) as w:
        w.say(NOTICE, at=NOW + 20)
        assert (await w.health())[0] == 503
        w.say(at=NOW + 21)
        assert (await w.health())[0] == 200
        async with w.client.post("/v1/completions", json=BODY) as response:
            assert response.status == 200


async def test_a_stopped_gateway_ignores_notices():
    async with world(FakeReplica(tokens([100]))) as w:
        w.shutdown.stop()
        w.router.close("The server is shutting down.")
        w.say(NOTICE)
        assert (await w.health())[1] == "The server is shutting down."
