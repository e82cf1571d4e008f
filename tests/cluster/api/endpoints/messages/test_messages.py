"""/v1/messages: the prompt is that of chat, the events follow Anthropic's order, and errors have its form."""

import json
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer
from support.fakes.replica import FakeReplica, tokens
from support.responses import events_in, read
from support.servers.live_replica import TEMPLATE, TOKENIZER

from cluster.api.app import make_app
from cluster.router.router import Router
from workers.protocol import FinishReason

PATH = "/v1/messages"
CALLS = [
    *TOKENIZER.encode("Well", bos=False),
    TOKENIZER.tool_calls_token_id,
    *TOKENIZER.encode('[{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]', bos=False),
]
TOOLS = [{"name": name, "input_schema": {"type": "object"}} for name in "fg"]
BODY: dict[str, Any] = {"model": "demo", "max_tokens": 100, "messages": [{"role": "user", "content": "x"}]}
USER = BODY["messages"][0]
CALL = {"type": "tool_use", "id": "abc123def", "name": "f", "input": {}}
THREAD = {"error_code": "thread_unsupported_request"}  # what Anthropic's client looks for
RESULT = {"type": "tool_result", "tool_use_id": "abc123def", "content": "x"}


@pytest.fixture
async def replica() -> FakeReplica:
    return FakeReplica(tokens(CALLS, stop_token_id=2), max_model_len=256)


@pytest.fixture
async def client(replica: FakeReplica):
    app = make_app(router=Router([replica]), tokenizer=TOKENIZER, chat_template=TEMPLATE, model_name="demo")
    async with TestClient(TestServer(app)) as client:
        yield client


async def test_text_and_calls_whole_and_as_events(client: TestClient) -> None:
    body = BODY | {"tools": TOOLS, "seed": 1}
    whole = await (await client.post(PATH, json=body)).json()
    assert [block["type"] for block in whole["content"]] == ["text", "tool_use", "tool_use"]
    assert [block.get("input") for block in whole["content"]] == [None, {"a": 1}, {}]
    assert (whole["stop_reason"], whole["stop_sequence"]) == ("tool_use", None)
    async with client.post(PATH, json=body | {"stream": True}) as response:
        events = [read(event) async for event in events_in(response.content)]
    kinds = [event["type"] for event in events]
    assert kinds[0] == "message_start" and kinds[-2:] == ["message_delta", "message_stop"]
    assert events[0]["message"]["usage"]["output_tokens"] == 0 and events[0]["message"]["stop_reason"] is None
    for index, block in enumerate(whole["content"]):
        own = [event for event in events if event.get("index") == index]
        assert own[0]["type"] == "content_block_start" and own[-1]["type"] == "content_block_stop"
        pieces = "".join(e["delta"].get("text", "") + e["delta"].get("partial_json", "") for e in own[1:-1])
        assert (pieces if index == 0 else json.loads(pieces)) == block.get("text", block.get("input"))
    assert events[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert events[-2]["usage"] == whole["usage"]


async def test_the_prompt_is_that_of_chat(client: TestClient, replica: FakeReplica) -> None:
    call = {"id": "abc123def", "name": "f", "input": {"a": 1}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "x"}]},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "y"},
                                          {"type": "tool_use", **call}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "abc123def", "content": "7"}]},
        {"role": "assistant", "content": "It is"},
    ]  # fmt: skip
    response = await client.post(PATH, json=BODY | {"messages": messages, "system": "Be kind.", "tools": TOOLS})
    assert response.status == 200, await response.text()
    function = {"name": "f", "arguments": '{"a": 1}'}
    chat = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "y", "tool_calls": [{"id": "abc123def", "function": function}]},
        {"role": "tool", "tool_call_id": "abc123def", "content": "7"},
        {"role": "assistant", "content": "It is", "prefix": True},
    ]
    tools = [{"type": "function", "function": {"name": n, "parameters": {"type": "object"}}} for n in "fg"]
    response = await client.post("/v1/chat/completions", json={"model": "demo", "messages": chat, "tools": tools})
    assert response.status == 200, await response.text()
    first, second = replica.requests
    assert first.prompt_token_ids == second.prompt_token_ids
    count = await client.post(
        f"{PATH}/count_tokens", json={"model": "demo", "messages": messages, "system": "Be kind.", "tools": TOOLS}
    )
    assert (await count.json())["input_tokens"] == len(first.prompt_token_ids)


@pytest.mark.parametrize(
    ("changes", "status", "kind", "said"),
    [
        ({"model": "other"}, 404, "not_found_error", "does not exist"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, 400, "invalid_request_error", "'image'"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, 400, "invalid_request_error", "functions"),
        ({"tool_choice": {"type": "tool"}}, 400, "invalid_request_error", "'name'"),
        ({"max_tokens": 0}, 400, "invalid_request_error", "max_tokens"),
        ({"messages": [{"role": "user", "content": "x y " * 300}]}, 400, "invalid_request_error", "context length"),
        ({"container": "c"}, 400, "invalid_request_error", "container"),
        ({"output_config": {"format": {"type": "json_schema", "schema": {"type": 7}}}}, 400,
         "invalid_request_error", "output_config"),
        ({"messages": [{"role": "user", "content": []}]}, 400, "invalid_request_error", "Send a message with text."),
        ({"messages": [{"role": "user", "content": [{"type": "thinking"}]}]}, 400, "invalid_request_error", "thoughts"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, 400, "invalid_request_error", "'tool_use', "),
        ({"messages": [{"role": "user", "content": [RESULT]}], "system": "x"}, 400, "invalid_request_error",
         "A tool result does not answer an open tool call. Set its 'tool_use_id'"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}, CALL]}]}, 400,
         "invalid_request_error", "Put it into a message of role 'assistant'."),
        ({"messages": [USER, {"role": "assistant", "content": [CALL]}, USER]}, 400, "invalid_request_error",
         "block of type 'tool_result'"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "invalid_request_error",
         "Use 'assistant', 'system' or 'user'."),
        ({"thread": {"type": "create"}}, 400, "invalid_request_error", "the whole conversation"),
        ({"output_format": {"type": "json_schema", "schema": {}}}, 400, "invalid_request_error", "output_config"),
    ],
)  # fmt: skip
async def test_errors_have_their_own_form(
    client: TestClient, changes: dict[str, Any], status: int, kind: str, said: str
) -> None:
    response = await client.post(PATH, json=BODY | changes)
    answer = await response.json()
    assert (response.status, answer["type"], answer["error"]["type"]) == (status, "error", kind), answer
    assert said in answer["error"]["message"]
    assert answer["error"].get("details") == (THREAD if "thread" in changes else None)
    if "messages" in changes:
        count = {name: value for name, value in (BODY | changes).items() if name != "max_tokens"}
        counted = await client.post(f"{PATH}/count_tokens", json=count)
        assert counted.status == 400 or said == "context length"


async def test_fields_without_effect_are_named(client: TestClient) -> None:
    body = BODY | {"thinking": {"type": "enabled", "budget_tokens": 1024}, "service_tier": "auto"}
    body["system"] = [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}]
    response = await client.post(PATH, json=body)
    assert response.headers["X-Tramontane-Ignored"] == "service_tier, system[].cache_control, thinking"
    off = await client.post(PATH, json=BODY | {"thinking": {"type": "disabled"}})
    assert "X-Tramontane-Ignored" not in off.headers


async def test_more_tokens_than_fit_mean_all_that_fit(client: TestClient, replica: FakeReplica) -> None:
    replica.script = tokens(TOKENIZER.encode("Well", bos=False), finish=FinishReason.LENGTH)
    answer = await (await client.post(PATH, json=BODY | {"max_tokens": 100_000})).json()
    assert answer["stop_reason"] == "model_context_window_exceeded"
    [request] = replica.requests
    assert len(request.prompt_token_ids) + request.sampling.max_tokens == replica.facts.max_model_len
    answer = await (await client.post(PATH, json=BODY)).json()
    assert answer["stop_reason"] == "max_tokens"
