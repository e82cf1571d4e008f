"""The whole gateway over replicas that are lost and drained: the client gets the same bytes as in an undisturbed run.

`make test` loses the replica after every fifth token, `make test-chaos` after each.
"""

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer
from support.fakes.replica import FakeReplica, tokens
from support.paths import DEMO_MODEL

from cluster.api.app import make_app
from cluster.router.router import Availability, Router
from cluster.text.chat.mistral_template import MistralTemplate
from cluster.text.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer(DEMO_MODEL)
TEMPLATE = MistralTemplate(TOKENIZER)
TEXT = "".join(f" wörld {i} 日本 of," for i in range(20))
OUTPUT = TOKENIZER.encode(TEXT, bos=False)[:64]
STOP_AT = "2 日本 o"  # spread over several tokens, some of them bytes of one character
# Ids and times differ between any two runs.
_OWN = re.compile(rb'"(id|created)": ?("[^"]*"|\d+)')


@contextlib.asynccontextmanager
async def serving(replicas: list[FakeReplica], **options: Any) -> AsyncIterator[tuple[TestClient, Router]]:
    router = Router(replicas, policy="round_robin")
    arguments = {"tokenizer": TOKENIZER, "chat_template": TEMPLATE, "model_name": "demo", **options}
    async with TestClient(TestServer(make_app(router=router, **arguments))) as client:
        yield client, router


def replica(name: str, **options: Any) -> FakeReplica:
    return FakeReplica(tokens(OUTPUT, stop_token_id=2), replica_id=name, max_model_len=512, **options)


async def body_of(replicas: list[FakeReplica], path: str, body: dict[str, Any]) -> bytes:
    async with serving(replicas) as (client, router):
        response = await client.post(path, json={"model": "demo", "seed": 1, **body})
        data = await response.read()
        assert response.status == 200, data
        assert (router.num_inflight_requests, router.num_queued_tokens, router.num_waiting) == (0, 0, 0)
    assert [r.num_open for r in replicas] == [0] * len(replicas)
    return _OWN.sub(rb'"\1":0', data)


COMPLETION = ("/v1/completions", {"prompt": "Hello", "max_tokens": 100})
CHAT = ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 100})
CASES = {
    "completion": (*COMPLETION,),
    "logprobs": (COMPLETION[0], COMPLETION[1] | {"logprobs": 2}),
    "stop": (COMPLETION[0], COMPLETION[1] | {"stop": [STOP_AT], "logprobs": 0}),
    "stop kept, special tokens": (
        COMPLETION[0],
        COMPLETION[1]
        | {"stop": [STOP_AT], "include_stop_str_in_output": True, "skip_special_tokens": False, "echo": True},
    ),
    "min_tokens": (COMPLETION[0], COMPLETION[1] | {"stop": [","], "min_tokens": 30}),
    "chat": (CHAT[0], CHAT[1] | {"logprobs": True, "top_logprobs": 1, "stop": STOP_AT}),
}


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.chaos)])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("case", CASES)
async def test_lost_at_every_token_the_bytes_are_the_same(case: str, stream: bool, every: int) -> None:
    path, body = CASES[case]
    body = body | ({"stream": True, "stream_options": {"include_usage": True}} if stream else {})
    undisturbed = await body_of([replica("a")], path, body)
    assert b'"completion_tokens"' in undisturbed, "usage is part of what must be equal"
    assert ("stop" not in body) or b'"stop"' in undisturbed
    num_lost = 0
    for lost_after in sorted({1, *range(0, len(OUTPUT) + 1, every), len(OUTPUT)}):
        replicas = [replica("a", lose_after=lost_after), replica("b")]
        assert await body_of(replicas, path, body) == undisturbed, f"replica a was lost after {lost_after} tokens"
        num_lost += replicas[0].condemned is not None
    assert num_lost > 20 // every, "most of the losses must have fallen into the stream"


async def test_each_of_several_sequences_resumes_on_its_own() -> None:
    body = {"prompt": ["Hello", "you"], "n": 2, "max_tokens": 100}
    undisturbed = await body_of([replica("a")], "/v1/completions", body)
    for lost_after in (0, 1, 30):
        replicas = [replica("a", lose_after=lost_after), replica("b")]
        assert await body_of(replicas, "/v1/completions", body) == undisturbed
        assert replicas[1].requests


@pytest.mark.parametrize("num", [1, 2])
async def test_a_sequence_without_an_end_is_an_error_that_nobody_waits_for(monkeypatch, num: int) -> None:
    """Which the router prevents: it continues such a stream on another replica."""
    whole = Router.generate

    async def without_end(self: Router, *arguments: Any, **more: Any) -> AsyncIterator[Any]:
        async with contextlib.aclosing(whole(self, *arguments, **more)) as deltas:
            async for delta in deltas:
                if delta.finish_reason is None:
                    yield delta

    monkeypatch.setattr(Router, "generate", without_end)
    async with serving([replica("a")]) as (client, _), asyncio.timeout(10):
        response = await client.post("/v1/completions", json={"model": "demo", "prompt": "x", "n": num, "seed": 1})
        assert response.status == 500
        assert (await response.json())["error"]["message"] == "The sequence ended without a reason."


async def test_a_failure_is_a_status_before_the_first_event_and_an_event_later() -> None:
    body = {"model": "demo", "prompt": "x", "stream": True}
    async with serving([replica("a", lose_after=0)]) as (client, _):
        response = await client.post("/v1/completions", json=body)
        assert response.status == 503, "before the first token a stream still has a status"
        assert response.headers["Retry-After"] == "1"
    async with serving([replica("a", lose_after=2)]) as (client, _):
        response = await client.post("/v1/completions", json=body)
        assert response.status == 200
        last = json.loads((await response.text()).strip().rsplit("data: ", 1)[1])
        assert last["error"]["type"] == "service_unavailable_error"
        assert last["error"]["message"] == "Replica a is lost."


@pytest.mark.parametrize("lost_after", [0, 3])
async def test_a_silent_stream_is_kept_alive(lost_after: int) -> None:
    """Comments are sent while the stream waits for another replica, before and after its first event."""
    lost, coming = replica("a", lose_after=lost_after), replica("b")
    async with serving([lost], keep_alive_s=0.05) as (client, router):
        router.update([lost], Availability(expected=True, facts=lost.facts))
        response = await client.post("/v1/completions", json={"model": "demo", "prompt": "x", "stream": True})
        assert response.status == 200
        seen = b""
        while seen.count(b": keep-alive\n\n") < 3:
            seen += await response.content.readany()
        router.update([coming], Availability())
        seen += await response.content.read()
    blocks = [b for b in seen.decode().split("\n\n") if b and b != ": keep-alive"]
    assert blocks.pop() == "data: [DONE]"
    texts = [json.loads(b.removeprefix("data: "))["choices"][0]["text"] for b in blocks]
    assert "".join(texts).strip() == TOKENIZER.decode(OUTPUT).strip()


async def test_after_a_keep_alive_an_error_is_an_event() -> None:
    async with serving([], keep_alive_s=0.02) as (client, router):
        router.update([], Availability(expected=True, facts=FakeReplica().facts))
        response = await client.post("/v1/completions", json={"model": "demo", "prompt": "x", "stream": True})
        assert (await response.content.readuntil(b"\n\n")) == b": keep-alive\n\n"
        router.update([], Availability(reason="The weights are damaged."))
        rest = (await response.content.read()).decode().replace(": keep-alive\n\n", "")
        assert json.loads(rest.removeprefix("data: "))["error"]["message"] == "The weights are damaged."


async def test_a_busy_stream_gets_no_comment() -> None:
    async with serving([replica("a")], keep_alive_s=60) as (client, _):
        response = await client.post("/v1/completions", json={"model": "demo", "prompt": "x", "stream": True})
        assert b"keep-alive" not in await response.read()


async def test_a_client_that_disconnects_while_waiting_frees_its_place() -> None:
    async with serving([]) as (client, router):
        router.update([], Availability(expected=True, facts=FakeReplica().facts))
        body = {"model": "demo", "prompt": "x", "n": 2}
        sending = asyncio.create_task(client.post("/v1/completions", json=body))
        async with asyncio.timeout(10):
            while router.num_waiting < 2:
                await asyncio.sleep(0.005)
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
            await client.session.close()
            while router.num_inflight_requests:
                await asyncio.sleep(0.005)
        assert (router.num_waiting, router.num_queued_tokens) == (0, 0)
