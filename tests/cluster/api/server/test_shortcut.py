"""Streams of which most events are written where their delta arrives: the same bytes as by the task that reads them."""

import json
import re
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer
from support.fakes.replica import FakeReplica, tokens
from support.paths import DEMO_MODEL

from cluster.api.app import make_app
from cluster.api.server.shortcut import Shortcut
from cluster.router.router import Router
from cluster.text.chat.mistral_template import MistralTemplate
from cluster.text.tokenizer import load_tokenizer
from workers.protocol import GenerateRequest, TokenDelta

TOKENIZER = load_tokenizer(DEMO_MODEL)
TEMPLATE = MistralTemplate(TOKENIZER)
OUTPUT = TOKENIZER.encode("".join(f" wörld {i} 日本 of," for i in range(12)), bos=False)[:60]
# Ids and times differ between any two runs.
_OWN = re.compile(rb'"(id|created|created_at|completed_at|item_id)": ?("[^"]*"|\d+)')
MESSAGES = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 100}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "completion": ("/v1/completions", {"prompt": "Hello", "max_tokens": 100}),
    "usage": ("/v1/completions", {"prompt": "Hello", "stream_options": {"include_usage": True}, "max_tokens": 100}),
    "logprobs": ("/v1/completions", {"prompt": "Hello", "logprobs": 2, "return_token_ids": True, "max_tokens": 100}),
    "chat": ("/v1/chat/completions", MESSAGES),
    "messages": ("/v1/messages", MESSAGES),
    "responses": ("/v1/responses", {"input": "x", "store": False, "max_output_tokens": 100}),
}


class Counting(FakeReplica):
    """Counts the deltas that were taken. offers: whether it asks at all."""

    def __init__(self, *, offers: bool) -> None:
        super().__init__(tokens(OUTPUT, stop_token_id=2), max_model_len=512)
        self.offers = offers
        self.num_taken = 0

    async def generate(
        self, request: GenerateRequest, *, take: Callable[[TokenDelta], bool] | None = None
    ) -> AsyncIterator[TokenDelta]:
        def counted(delta: TokenDelta) -> bool:
            is_taken = take is not None and take(delta)
            self.num_taken += is_taken
            return is_taken

        async for delta in super().generate(request, take=counted if self.offers else None):
            yield delta


async def answered(path: str, body: dict[str, Any], *, offers: bool) -> tuple[bytes, int]:
    """The response, and how many deltas took the shortcut."""
    replica = Counting(offers=offers)
    app = make_app(router=Router([replica]), tokenizer=TOKENIZER, chat_template=TEMPLATE, model_name="demo")
    async with TestClient(TestServer(app)) as client:
        response = await client.post(path, json={"model": "demo", "stream": True, **body})
        data = await response.read()
        assert response.status == 200, data
    return _OWN.sub(rb'"\1":0', data), replica.num_taken


@pytest.mark.parametrize("case", CASES)
async def test_all_but_the_first_and_the_last_delta_take_it_and_the_bytes_are_the_same(case: str) -> None:
    path, body = CASES[case]
    expected, none = await answered(path, body, offers=False)
    found, num_taken = await answered(path, body, offers=True)
    assert found == expected
    assert (none, num_taken) == (0, len(OUTPUT) - 1), "after the output comes a stop token"


async def test_what_a_stop_string_may_end_does_not_take_it() -> None:
    path, body = CASES["completion"]
    _, num_taken = await answered(path, body | {"stop": ["never to be seen"]}, offers=True)
    assert num_taken == 0


async def test_several_sequences_take_it_each_in_its_order() -> None:
    path, body = CASES["completion"]
    whole, _ = await answered(path, body | {"n": 3, "stream": False}, offers=False)
    data, num_taken = await answered(path, body | {"n": 3}, offers=True)
    texts = ["", "", ""]
    for line in data.splitlines():
        if line.startswith(b"data: {"):
            (choice,) = json.loads(line[6:])["choices"]
            texts[choice["index"]] += choice["text"]
    assert texts == [choice["text"] for choice in json.loads(whole)["choices"]]
    assert num_taken > 0


def test_it_is_closed_until_somebody_reads_and_after_that() -> None:
    written: list[str] = []
    shortcut: Shortcut[str] = Shortcut()
    assert not shortcut.is_free()
    shortcut.open(is_free=lambda: True, write=written.append)
    assert shortcut.is_free()
    shortcut.write("event")
    shortcut.close()
    assert written == ["event"] and not shortcut.is_free()
