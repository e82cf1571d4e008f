"""Chat with a model that thinks: vLLM's `reasoning_content`, whole and in a stream, and nothing of it for other models."""

import json
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer
from support.fakes.replica import FakeReplica, tokens
from support.vocabularies.tekken import write_tekken

from cluster.api.app import make_app
from cluster.router.router import Router
from cluster.text.load import LoadedText, load_text

ANSWER = "[THINK]2 and 2[/THINK]It is 4."


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> LoadedText:
    return load_text(write_tekken(tmp_path_factory.mktemp("v13"), "v13"), chat_template="auto", model_vocab_size=3040)


async def ask(text: LoadedText, answer: str, **fields: Any) -> str:
    ids = text.tokenizer.encode_prompt(answer, add_special_tokens=False)
    replica = FakeReplica(tokens(ids, stop_token_id=2), vocab_size=3040, max_model_len=2048)
    app = make_app(router=Router([replica]), tokenizer=text.tokenizer, chat_template=text.chat_template, model_name="m")
    async with TestClient(TestServer(app)) as client:
        body = {"model": "m", "messages": [{"role": "user", "content": "2 and 2?"}]} | fields
        response = await client.post("/v1/chat/completions", json=body)
        assert response.status == 200, await response.text()
        return await response.text()


async def test_a_response(text: LoadedText) -> None:
    choice = json.loads(await ask(text, ANSWER))["choices"][0]
    assert (choice["message"]["reasoning_content"], choice["message"]["content"]) == ("2 and 2", "It is 4.")
    assert choice["finish_reason"] == "stop"


async def test_a_response_of_thoughts_only(text: LoadedText) -> None:
    message = json.loads(await ask(text, "[THINK]2 and 2"))["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("2 and 2", None)


async def test_a_stream(text: LoadedText) -> None:
    body = await ask(text, ANSWER, stream=True, return_token_ids=True)
    events = [json.loads(line[6:]) for line in body.splitlines() if line.startswith("data: {")]
    choices = [choice for event in events for choice in event["choices"]]
    deltas = [choice["delta"] for choice in choices]
    assert "".join(delta.get("reasoning_content") or "" for delta in deltas) == "2 and 2"
    assert "".join(delta.get("content") or "" for delta in deltas) == "It is 4."
    first_text = next(i for i, delta in enumerate(deltas) if delta.get("content"))
    assert not any(delta.get("reasoning_content") for delta in deltas[first_text:])
    sent = [i for choice in choices for i in choice.get("token_ids") or ()]
    assert sent[:-1] == text.tokenizer.encode_prompt(ANSWER, add_special_tokens=False), "each token once"


async def test_an_answer_without_thoughts_has_no_such_field(text: LoadedText) -> None:
    body = await ask(text, "It is 4.")
    assert "reasoning_content" not in body and json.loads(body)["choices"][0]["message"]["content"] == "It is 4."
