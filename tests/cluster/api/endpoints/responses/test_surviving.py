"""A stored response outlives its connection, its replica and its gateway: the same events, none twice, none missing."""

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import TestClient
from support.batch.app import batch_app
from support.fakes.replica import FakeReplica, tokens
from support.responses import PATH, again, create_stream, post, read
from support.servers.live_replica import TOKENIZER

from cluster.batch.store.open import open_store
from cluster.responses.records import Append, encode_steps

TEXT = "".join(f" wörld {i} 日本 of," for i in range(6))
OUTPUT = TOKENIZER.encode(TEXT, bos=False)
BODY = {"max_output_tokens": 200, "include": ["message.output_text.logprobs"], "top_logprobs": 2}


def replica(name: str = "a", **options: Any) -> FakeReplica:
    return FakeReplica(tokens(OUTPUT, stop_token_id=2), replica_id=name, max_model_len=512, **options)


async def metrics_of(client: TestClient) -> dict[str, float]:
    """What /metrics says of stored responses, by name and status."""
    text = await (await client.get("/metrics")).text()
    found = re.findall(
        r'^tramontane:(\w*stored_responses\w*)\{model_name="demo"(?:,status="(\w+)")?\} (\S+)$', text, re.MULTILINE
    )
    return {f"{name} {status}".strip(): float(value) for name, status, value in found}


async def test_reading_again_from_any_event_gives_the_same_bytes(tmp_path: Path) -> None:
    async with batch_app(tmp_path, [replica()]) as client:
        events = [event async for event in create_stream(client, BODY)]
        response_id = read(events[0])["response"]["id"]
        assert [read(event)["sequence_number"] for event in events] == list(range(len(events)))
        last = read(events[-1])
        assert last["type"] == "response.completed"
        assert last["response"]["output"][0]["content"][0]["text"] == TEXT
        for after in (-1, *range(0, len(events), 7), len(events) - 2, len(events) - 1, 10_000):
            assert await again(client, response_id, after=after) == events[after + 1 :], f"after {after}"
        whole = await (await client.get(f"{PATH}/{response_id}")).json()
        assert whole == last["response"]
        counts = await metrics_of(client)
        assert counts["stored_responses_total completed"] == 1 and counts["stored_responses_resumed_total"] >= 6


async def test_a_response_goes_on_without_its_client(tmp_path: Path) -> None:
    holding = replica(hold_after=5)
    async with batch_app(tmp_path, [holding]) as client:
        stream = create_stream(client, BODY)
        seen = [await anext(stream) for _ in range(6)]
        await stream.aclose()  # the connection is gone
        response_id = read(seen[0])["response"]["id"]
        running = await (await client.get(f"{PATH}/{response_id}")).json()
        assert (running["status"], running["usage"]) == ("in_progress", None)
        reading = asyncio.create_task(again(client, response_id, after=5))
        assert (await metrics_of(client))["num_stored_responses_running"] == 1
        holding.release.set()
        rest = await reading
        assert [read(event)["sequence_number"] for event in seen + rest] == list(range(len(seen + rest)))
        assert await again(client, response_id) == seen + rest
        assert holding.num_open == 0 and len(holding.requests) == 1


async def test_a_lost_replica_changes_no_byte(tmp_path: Path) -> None:
    async def text(folder: str, replicas: list[FakeReplica]) -> list[bytes]:
        async with batch_app(tmp_path / folder, replicas) as client:
            events = [event async for event in create_stream(client, BODY)]
            response = read(events[0])["response"]
            own = response["id"].removeprefix("resp_").encode()
            return [
                event.replace(own, b"ID").replace(str(response["created_at"]).encode(), b"T") for event in events[:-1]
            ]

    whole = await text("a", [replica()])
    assert await text("b", [replica(lose_after=7), replica("b")]) == whole


@pytest.mark.parametrize("num_stored", [0, 1, 2, 9, len(OUTPUT) - 1, len(OUTPUT), len(OUTPUT) + 1])
async def test_another_gateway_finishes_what_a_dead_one_began(tmp_path: Path, num_stored: int) -> None:
    """The dead gateway stored so many steps, and its lease is nobody's."""
    body = BODY | {"tools": [{"type": "function", "name": "f"}]} | {"input": "Hello"}
    async with batch_app(tmp_path / "whole", [replica()]) as client:
        events = [event async for event in create_stream(client, body)]
        response_id = read(events[0])["response"]["id"]
    whole = open_store(tmp_path / "whole")
    stored = await whole.responses.get(response_id)
    _, steps = await whole.responses.follow(response_id, after=0)
    await whole.close()
    assert len(steps) == len(OUTPUT) + 1

    began = type(stored.record)(
        id=response_id, owner="", status="in_progress",
        created_at=stored.record.created_at, expires_at=stored.record.expires_at,
    )  # fmt: skip
    cut = open_store(tmp_path / "cut")
    lease = await cut.responses.add(
        type(stored)(record=began, request=stored.request), owner="no/such/owner", ttl_s=0, now=1
    )
    if num_stored:
        await cut.responses.append([Append(lease=lease, number=0, data=encode_steps(steps[:num_stored]))])
    await cut.close()
    other = replica("b")
    async with batch_app(tmp_path / "cut", [other]) as client:
        finished = await again(client, response_id)
        time_of = lambda event: str(read(event)["response"]["completed_at"]).encode()  # noqa: E731
        assert finished[:-1] == events[:-1]
        assert finished[-1] == events[-1].replace(
            b'"completed_at":' + time_of(events[-1]), b'"completed_at":' + time_of(finished[-1])
        )
    if num_stored <= len(OUTPUT):
        [request] = other.requests
        assert request.output_token_ids == OUTPUT[:num_stored]
        assert request.sampling == stored.request.generate.sampling
    else:
        assert not other.requests, "only the end was missing"


async def test_a_gateway_that_stops_leaves_its_responses_to_the_next(tmp_path: Path) -> None:
    holding = replica(hold_after=5)
    async with batch_app(tmp_path, [holding]) as client:
        created = await post(client, BODY | {"background": True})
        assert created["status"] == "queued" and created["background"]
        await holding.holding.wait()
    assert holding.num_open == 0
    async with batch_app(tmp_path, [replica("b")]) as client:
        events = [read(event) for event in await again(client, created["id"])]
        counts = await metrics_of(client)
    assert (counts["stored_responses_taken_over_total"], counts["stored_responses_total completed"]) == (1, 1)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [event["type"].removeprefix("response.") for event in events[:3]] == ["created", "queued", "in_progress"]
    assert events[-1]["response"]["output"][0]["content"][0]["text"] == TEXT


async def test_two_gateways_on_one_store(tmp_path: Path) -> None:
    """One runs it, the other reads along, and cancels it."""
    holding = replica(hold_after=5)
    async with batch_app(tmp_path, [holding]) as first, batch_app(tmp_path, [replica("b")]) as second:
        created = await post(first, BODY | {"background": True})
        await holding.holding.wait()
        reading = asyncio.create_task(again(second, created["id"]))
        response = await second.post(f"{PATH}/{created['id']}/cancel")
        cancelled = await response.json()
        assert cancelled["status"] == "cancelled", cancelled
        events = [read(event) for event in await reading]
        assert events[-1]["response"] == cancelled
        assert events[-1]["type"] == "response.incomplete"
        assert await (await first.get(f"{PATH}/{created['id']}")).json() == cancelled
        counts = [await metrics_of(client) for client in (first, second)]
        assert [count["stored_responses_total cancelled"] for count in counts] == [0, 1]
        holding.release.set()
        async with asyncio.timeout(10):
            while holding.num_open:
                await asyncio.sleep(0.01)


async def test_cancelling_and_deleting_free_the_replica(tmp_path: Path) -> None:
    for delete in (False, True):
        holding = replica(hold_after=5)
        async with batch_app(tmp_path, [holding]) as client:
            created = await post(client, BODY | {"background": True})
            await holding.holding.wait()
            path = f"{PATH}/{created['id']}"
            response = await (client.delete(path) if delete else client.post(f"{path}/cancel"))
            assert response.status == 200, await response.text()
            async with asyncio.timeout(10):
                await holding.closed.wait()
            assert (await client.get(path)).status == (404 if delete else 200)
            assert len(holding.requests) == 1, "it was started again"


async def test_a_response_in_the_background_waits_for_a_replica(tmp_path: Path) -> None:
    waiting = replica()
    waiting.reason = "still loading"
    async with batch_app(tmp_path, [waiting]) as client:
        created = await post(client, BODY | {"background": True})
        assert (await (await client.get(f"{PATH}/{created['id']}")).json())["status"] == "queued"
        waiting.reason = None
        events = [read(event) for event in await again(client, created["id"])]
        assert events[-1]["type"] == "response.completed"


async def test_other_numerics_are_told_to_every_reader(tmp_path: Path) -> None:
    replicas = [replica(numerics="one", lose_after=7), replica("b", numerics="two")]
    async with batch_app(tmp_path, replicas, numerics_wait_s=0.0) as client:
        async with client.post(PATH, json={"model": "demo", "input": "x", **BODY, "stream": True}) as response:
            text = await response.text()
        assert text.count(": X-Tramontane-Moved: other-numerics\n") == 1
        response_id = read(text.split("\n\n")[0].encode() + b"\n\n")["response"]["id"]
        for query in ("", "?stream=true"):
            later = await client.get(f"{PATH}/{response_id}{query}")
            assert later.headers["X-Tramontane-Moved"] == "other-numerics"
