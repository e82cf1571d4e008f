"""What the gateway keeps of requests: nothing after their end, whatever names clients make up, and no body while a stream lasts."""

import asyncio
import contextlib
import gc
import json
import random
import time
import tracemalloc
from collections import Counter
from collections.abc import AsyncIterator

import pytest
from aiohttp import ClientSession
from aiohttp.test_utils import TestServer
from support.clients.fuzz_bodies import other_bodies
from support.clients.random_schemas import random_schema
from support.fakes.replica import FakeReplica, tokens
from support.paths import DEMO_MODEL

from cluster.api.app import make_app
from cluster.metrics.gateway import Metrics
from cluster.router.router import Router
from cluster.text.chat.mistral_template import MistralTemplate
from cluster.text.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer(DEMO_MODEL)
TEMPLATE = MistralTemplate(TOKENIZER)
MIB = 2**20
# Of good and bad requests. What is kept of each shows as so many objects of one kind.
NUM_ROUNDS = 32
JSON = {"Content-Type": "application/json"}


@contextlib.asynccontextmanager
async def connect(replica: FakeReplica) -> AsyncIterator[tuple[ClientSession, Metrics]]:
    """A session and the gateway's metrics. No TestClient: it keeps every response."""
    router = Router([replica])
    metrics = Metrics(router, model_name="demo_model")
    app = make_app(
        router=router,
        tokenizer=TOKENIZER,
        chat_template=TEMPLATE,
        model_name="demo_model",
        api_key="key",
        metrics=metrics,
    )
    async with (
        TestServer(app) as server,
        ClientSession(base_url=server.make_url("/"), headers={"Authorization": "Bearer key"}) as client,
    ):
        yield client, metrics


async def send_many(client: ClientSession, rng: random.Random, count: int) -> Counter[int]:
    """Good and bad requests, each with a key, model, path, user, id and schema that never occurred before."""
    statuses: Counter[int] = Counter()

    async def send(path: str, body: bytes, **headers: str) -> None:
        async with client.post(path, data=body, headers={**JSON, **headers}) as response:
            await response.read()
            statuses[response.status] += 1

    for path, invalid in other_bodies(rng, count):
        name = f"name{rng.getrandbits(64):x}"
        good = {"model": "demo_model", "prompt": "x", "max_tokens": 2, "user": name}
        schema = {"type": "json_schema", "json_schema": {"name": name, "schema": random_schema(rng.getrandbits(32))}}
        await send(path, invalid)
        await send(f"/v1/{name}", b"{}")
        await send("/v1/completions", json.dumps(good).encode(), **{"X-Request-Id": name, f"X-{name}": name})
        await send("/v1/completions", json.dumps({**good, "model": name}).encode())
        await send("/v1/completions", json.dumps({**good, "response_format": schema}).encode())
        await send("/v1/completions", json.dumps(good).encode(), Authorization=f"Bearer {name}")
        async with client.post("/v1/completions", json={**good, "max_tokens": 40, "stream": True}) as response:
            await response.content.read(20)  # and leave
            statuses[response.status] += 1
    return statuses


async def alive() -> Counter[str]:
    """How many objects of each kind there are."""
    loop = asyncio.get_running_loop()
    for _ in range(
        300
    ):  # the loop keeps up to a hundred canceled timers with their contexts; beyond that it drops them all
        loop.call_later(3600, print).cancel()
    await asyncio.sleep(0)
    for _ in range(3):
        gc.collect()
    kinds = Counter(f"{type(o).__module__}.{type(o).__qualname__}" for o in gc.get_objects())
    del kinds["yarl.URL"]  # the library caches the last few hundred
    return kinds


def traced_bytes() -> int:
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


async def growth(client, rng: random.Random, replica: FakeReplica) -> Counter[str]:
    """By type, how many more objects there are after another NUM_ROUNDS of requests."""
    before = await alive()
    statuses = await send_many(client, rng, NUM_ROUNDS)
    assert statuses[200] > NUM_ROUNDS and statuses[400] > NUM_ROUNDS / 2, statuses
    assert statuses[401] == NUM_ROUNDS and statuses[404] >= 2 * NUM_ROUNDS, statuses
    replica.requests.clear()  # which the fake keeps
    deadline = time.monotonic() + 5
    while max((grown := await alive() - before).values(), default=0) >= NUM_ROUNDS and time.monotonic() < deadline:
        await asyncio.sleep(0.1)  # abandoned streams end a moment later
    return grown


async def test_no_object_is_kept_of_a_request_that_ended():
    rng = random.Random(5)
    replica = FakeReplica(tokens([300] * 40), max_num_seqs=64)
    async with connect(replica) as (client, metrics):
        await send_many(
            client, rng, 64
        )  # what is loaded or made at its first use, also for endpoints that are drawn seldom
        replica.requests.clear()
        await alive()  # counting itself makes some objects once
        series = len(metrics.render().splitlines())
        # Caches of libraries fill once, whenever a kind of request is first drawn. What is kept for each request grows every time.
        for _ in range(3):
            grown = await growth(client, rng, replica)
            if max(grown.values(), default=0) < NUM_ROUNDS:
                break
        else:
            pytest.fail(f"one of a kind is kept for each round of requests: {grown.most_common(5)}")
        # A status that did not occur before may add a line; a name of a client may not.
        assert len(metrics.render().splitlines()) - series < 30


async def test_a_stream_does_not_keep_its_body():
    replica = FakeReplica(tokens([300] * 4), hold_after=1)
    body = b'{"model": "demo_model", "prompt": "x", "max_tokens": 4, "stream": true' + b" " * (6 * MIB) + b"}"
    async with connect(replica) as (client, _):
        tracemalloc.start()
        try:
            async with client.post("/v1/completions", data=body, headers=JSON) as response:
                assert response.status == 200, await response.text()
                await response.content.readuntil(b"\n\n")
                deadline = time.monotonic() + 10
                while (held := traced_bytes()) >= 2 * MIB and time.monotonic() < deadline:
                    await asyncio.sleep(0.05)  # the thread that parsed the body lets go of it a moment later
                assert held < 2 * MIB, f"{held / MIB:.1f} MiB while it streams"
                replica.release.set()
                await response.read()
        finally:
            tracemalloc.stop()
