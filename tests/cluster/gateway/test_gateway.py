"""How a whole gateway on a port stops, with an unreachable controller and a replica that holds its streams."""

import asyncio
import json
from collections.abc import AsyncIterator

import aiohttp
import pytest
from support.fakes.replica import FakeReplica, tokens
from support.paths import DEMO_MODEL

from cluster.cli.options.parser import make_parser
from cluster.cli.options.settings import serve_config
from cluster.gateway.deployment import Part
from cluster.gateway.gateway import Gateway
from cluster.router.replica import Availability
from cluster.text.load import load_text
from workers.errors import ReplicaUnavailableError

MODEL = DEMO_MODEL
BODY = {"model": "demo", "prompt": [3, 4, 5], "stream": True}


class AbsentController:
    async def sync(self, known, report):
        await asyncio.sleep(0.01)
        raise ReplicaUnavailableError("The controller cannot be reached.")

    async def leave(self, gateway_id: str) -> None: ...


@pytest.fixture
async def gateway(monkeypatch) -> AsyncIterator[Gateway]:
    monkeypatch.delenv("TRAMONTANE_API_KEY", raising=False)
    args = make_parser().parse_args(["serve", "--port", "0", "--no-batches"])
    config = serve_config(args, MODEL, "demo", device="cpu")
    text = load_text(MODEL, chat_template="auto", model_vocab_size=4096)
    gateway = Gateway([Part(config=config, controller=AbsentController(), text=text)])
    await gateway.open()
    try:
        yield gateway
    finally:
        await gateway.close()


async def events(url: str) -> list[str]:
    async with aiohttp.ClientSession() as session, session.post(f"{url}/v1/completions", json=BODY) as response:
        return (await response.text()).strip().split("\n\n")


async def test_a_request_that_outlasts_the_drain_timeout_gets_an_error(gateway):
    replica = FakeReplica(tokens(range(100, 110)), hold_after=3)
    gateway.router.update([replica], Availability())
    running = asyncio.create_task(events(gateway.url))
    await replica.holding.wait()
    async with asyncio.timeout(5):
        await gateway.drain(0.1)
        *chunks, last = await running
    assert len(chunks) == 3, "the tokens generated so far were not sent"
    error = json.loads(last.removeprefix("data: "))["error"]
    assert error["code"] == "server_leaving"
    assert error["message"].startswith("The server is shutting down.")


@pytest.mark.parametrize("is_urgent", [False, True])
async def test_a_second_stop_ends_running_requests_at_once(gateway, is_urgent):
    replica = FakeReplica(tokens(range(100, 110)), hold_after=3)
    gateway.router.update([replica], Availability())
    running = asyncio.create_task(events(gateway.url))
    await replica.holding.wait()
    urgent = asyncio.Event()
    draining = asyncio.create_task(gateway.drain(60.0, urgent))
    await asyncio.sleep(0.1)
    assert not draining.done()
    (urgent if is_urgent else replica.release).set()
    async with asyncio.timeout(5):
        await draining
        assert ("server_leaving" in (await running)[-1]) is is_urgent
