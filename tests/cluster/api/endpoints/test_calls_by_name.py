"""Chat with tools on a model of Mistral's later formats: a tekken vocabulary and calls by name, from the request to the response."""

import json
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer
from support.fakes.replica import FakeReplica, tokens
from support.tekken import write_tekken

from cluster.api.app import make_app
from cluster.router.router import Router
from cluster.text.load import LoadedText, load_text

EOS = 2
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}
QUESTION = {"role": "user", "content": "Weather in Zürich?"}
ANSWER = '[TOOL_CALLS]get_weather[ARGS]{"city": "Zürich"}[TOOL_CALLS]get_weather[ARGS]{}'


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> LoadedText:
    return load_text(write_tekken(tmp_path_factory.mktemp("v13"), "v13"), chat_template="auto", model_vocab_size=3040)


async def ask(text: LoadedText, answer: str, **fields: Any) -> tuple[str, FakeReplica]:
    """The response's body, to an answer in which control tokens are tokens."""
    ids = text.tokenizer.encode_prompt(answer, add_special_tokens=False)
    replica = FakeReplica(tokens(ids, stop_token_id=EOS), vocab_size=3040, max_model_len=2048)
    app = make_app(router=Router([replica]), tokenizer=text.tokenizer, chat_template=text.chat_template, model_name="m")
    async with TestClient(TestServer(app)) as client:
        body = {"model": "m", "messages": [QUESTION], "tools": [TOOL]} | fields
        response = await client.post("/v1/chat/completions", json=body)
        assert response.status == 200, await response.text()
        return await response.text(), replica


def called(calls: list[dict[str, Any]]) -> list[tuple[str, str]]:
    assert len({call["id"] for call in calls}) == len(calls)
    return [(call["function"]["name"], call["function"]["arguments"]) for call in calls]


async def test_a_response(text: LoadedText) -> None:
    body, replica = await ask(text, ANSWER)
    choice = json.loads(body)["choices"][0]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", None)
    assert called(choice["message"]["tool_calls"]) == [("get_weather", '{"city": "Zürich"}'), ("get_weather", "{}")]
    prompt = [text.tokenizer.token_text(i) for i in replica.requests[0].prompt_token_ids]
    assert prompt[:2] == ["<s>", "[AVAILABLE_TOOLS]"] and prompt[-1] == "[/INST]"
    assert replica.requests[0].sampling.grammar is not None


async def test_a_stream(text: LoadedText) -> None:
    body, _ = await ask(text, ANSWER, stream=True)
    events = [json.loads(line[6:]) for line in body.splitlines() if line.startswith("data: {")]
    calls: list[dict[str, Any]] = []
    for event in events:
        for delta in event["choices"][0]["delta"].get("tool_calls") or ():
            if delta["index"] == len(calls):
                calls.append({"id": delta["id"], "function": {"name": delta["function"]["name"], "arguments": ""}})
            calls[delta["index"]]["function"]["arguments"] += delta["function"].get("arguments") or ""
    assert called(calls) == [("get_weather", '{"city": "Zürich"}'), ("get_weather", "{}")]
    assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"


async def test_the_conversation_goes_on(text: LoadedText) -> None:
    """Calls and results of other servers' ids are written in the format too."""
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Zürich"}'}}
    result = {"role": "tool", "tool_call_id": "call_1", "content": "rain"}
    messages = [QUESTION, {"role": "assistant", "tool_calls": [call]}, result]
    body, replica = await ask(text, "It rains.", messages=messages)
    assert json.loads(body)["choices"][0]["message"]["content"] == "It rains."
    shown = "".join(text.tokenizer.token_text(i) for i in replica.requests[0].prompt_token_ids)
    assert (
        '[/INST][TOOL_CALLS]get_weather[ARGS]{"city": "Zürich"}</s>[TOOL_RESULTS]rain[/TOOL_RESULTS]'
        in shown.replace("<0xC3><0xBC>", "ü")
    )
