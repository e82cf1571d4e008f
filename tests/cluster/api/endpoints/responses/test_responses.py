"""/v1/responses: what a body means, what is refused, conversations, keys, and responses that are not stored."""

from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp.test_utils import TestClient, TestServer
from support.batch.app import batch_app
from support.fakes.replica import FakeReplica, tokens
from support.responses import PATH, again, create_stream, post, read, refusal
from support.servers.live_replica import TEMPLATE, TOKENIZER

from cluster.api.app import make_app
from cluster.keys.file import add_key
from cluster.keys.key import Limits, new_key
from cluster.keys.keyring import Keyring
from cluster.keys.ledger import Ledger, read_usage
from cluster.router.router import Router
from workers.protocol import FinishReason, TokenDelta

ANSWER = TOKENIZER.encode("Fine", bos=False)


def replica(**options: Any) -> FakeReplica:
    return FakeReplica(tokens(ANSWER, stop_token_id=2), max_model_len=256, **options)


async def test_a_conversation_goes_on_from_a_stored_response(tmp_path: Path) -> None:
    answering = replica()
    async with batch_app(tmp_path, [answering]) as client:
        first = await post(client, {"input": "How are you?", "instructions": "Be kind.", "metadata": {"a": "b"}})
        assert first["status"] == "completed" and first["output"][0]["content"][0]["text"] == "Fine"
        second = await post(client, {"input": "And she?", "previous_response_id": first["id"]})
        await post(
            client,
            {
                "input": [
                    {"role": "user", "content": "How are you?"},
                    first["output"][0],
                    {"role": "user", "content": [{"type": "input_text", "text": "And she?"}]},
                ]
            },
        )
        prompts = [request.prompt_token_ids for request in answering.requests]
        assert prompts[1] == prompts[2], "instructions are not carried over"
        await post(client, {"input": "And they?", "previous_response_id": second["id"], "instructions": "Be kind."})
        assert len(answering.requests[3].prompt_token_ids) > len(prompts[1])
        await client.delete(f"{PATH}/{first['id']}")
        error = await refusal(client, {"previous_response_id": second["id"]})
        assert error["param"] == "previous_response_id" and first["id"] in error["message"]


async def test_calls_and_results_are_as_in_chat(tmp_path: Path) -> None:
    answering = replica()
    tool = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}
    call = {"name": "f", "arguments": "{}"}
    async with batch_app(tmp_path, [answering]) as client:
        await post(
            client,
            {
                "tools": [{"type": "function", **tool}],
                "input": [
                    {"role": "user", "content": "x"},
                    {"type": "reasoning", "summary": []},
                    {"type": "function_call", "call_id": "abc123def", **call},
                    {"type": "function_call_output", "call_id": "abc123def", "output": "7"},
                ],
            },
        )
        messages = [
            {"role": "user", "content": "x"},
            {"role": "assistant", "tool_calls": [{"id": "abc123def", "type": "function", "function": call}]},
            {"role": "tool", "tool_call_id": "abc123def", "content": "7"},
        ]
        body = {"model": "demo", "messages": messages, "tools": [{"type": "function", "function": tool}]}
        assert (await client.post("/v1/chat/completions", json=body)).status == 200
        first, second = answering.requests
        assert first.prompt_token_ids == second.prompt_token_ids
        allowed = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "g"}]}
        error = await refusal(client, {"tools": [{"type": "function", **tool}], "tool_choice": allowed})
        assert "'g'" in error["message"]


async def test_truncation_drops_whole_turns_from_the_beginning(tmp_path: Path) -> None:
    answering = replica()
    turns = [
        message
        for i in range(40)
        for message in ({"role": "user", "content": f"Question {i}?"}, {"role": "assistant", "content": "Yes."})
    ]
    conversation = [{"role": "system", "content": "Be kind."}, *turns, {"role": "user", "content": "Last?"}]
    async with batch_app(tmp_path, [answering]) as client:
        error = await refusal(client, {"input": conversation, "max_output_tokens": 20})
        assert error["code"] == "context_length_exceeded" and error["param"] in ("input", "max_output_tokens")
        response = await post(client, {"input": conversation, "max_output_tokens": 20, "truncation": "auto"})
        assert response["truncation"] == "auto"
        [request] = answering.requests
        assert len(request.prompt_token_ids) + 20 <= 256
        text = "".join(TOKENIZER.token_text(token_id) for token_id in request.prompt_token_ids)
        assert "kind" in text and "Last" in text
        longest = [conversation[0], *conversation[-(2 * text.count("Question") + 1) - 2 :]]
        error = await refusal(client, {"input": longest, "max_output_tokens": 20})
        assert error["code"] == "context_length_exceeded", "one more turn would not have fitted"


async def test_keys_see_their_own_and_are_charged_once(tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    secrets = {}
    for name in ("a", "b"):
        key, secrets[name] = new_key(name, limits=Limits())
        add_key(keys, key)
    ledger = Ledger(tmp_path / "usage.db")
    headers = {name: {"Authorization": f"Bearer {secret}"} for name, secret in secrets.items()}
    async with batch_app(tmp_path / "data", [replica()], keyring=Keyring(keys), ledger=ledger) as client:
        response = await post(client, {"background": True}, headers=headers["a"])
        path = f"{PATH}/{response['id']}"
        await again(client, response["id"], headers=headers["a"])
        whole = await post(client, {}, headers=headers["a"])
        assert (await client.get(path, headers=headers["a"])).status == 200
        for method in (client.get, client.delete):
            assert (await method(path, headers=headers["b"])).status == 404
        error = await client.post(
            PATH, json={"model": "demo", "input": "x", "previous_response_id": response["id"]}, headers=headers["b"]
        )
        assert error.status == 400
    await ledger.close()
    [sums] = [sums for group, sums in read_usage(tmp_path / "usage.db", days=1) if group.key_name == "a"]
    assert (sums.requests, sums.errors) == (2, 0)
    assert sums.completion_tokens == 2 * whole["usage"]["output_tokens"]
    assert sums.prompt_tokens == 2 * whole["usage"]["input_tokens"]


async def test_without_a_store_responses_are_not_kept() -> None:
    app = make_app(router=Router([replica()]), tokenizer=TOKENIZER, chat_template=TEMPLATE, model_name="demo")
    async with TestClient(TestServer(app)) as client:
        response = await post(client, {})
        assert response["store"] is False and response["status"] == "completed"
        events = [read(event) async for event in create_stream(client, {})]
        assert events[-1]["response"]["output"][0]["content"] == response["output"][0]["content"]
        for body in ({"store": True}, {"background": True}, {"previous_response_id": "resp_1"}):
            assert (await refusal(client, body))["code"] == "store_disabled"
        assert (await client.get(f"{PATH}/resp_1")).status == 400


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input", "images"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input", "files"),
        ({"input": [{"type": "computer_call"}]}, "input", "function_call_output"),
        ({"input": []}, "input", "length >= 1"),
        ({"tools": [{"type": "mcp"}]}, "tools", "Only functions"),
        ({"tool_choice": "required"}, "tool_choice", "'tools'"),
        ({"text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": 7}}}}, "text", "text: "),
        ({"include": ["everything"]}, "include", "everything"),
        ({"background": True, "store": False}, "background", "store"),
        ({"prompt": {"id": "p"}}, "prompt", "instructions"),
        ({"conversation": "c"}, "conversation", "previous_response_id"),
        ({"metadata": {"k": 7}}, "metadata", "str"),
        ({"max_output_tokens": 4000}, "max_output_tokens", "context length"),
        ({"top_p": 2}, "top_p", "1.0"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input", "Send a message too."),
        (
            {"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}], "instructions": "x"},
            "input",
            "A tool result does not answer an open tool call. Set its 'call_id'",
        ),
        ({"truncation": "all"}, "truncation", "Use 'auto' or 'disabled'."),
        ({"tool_choice": {"type": "file_search"}}, "tool_choice", "Use 'function' or 'allowed_tools'."),
        ({"text": {"format": {"type": "grammar"}}}, "text", "Use 'text', 'json_object' or 'json_schema'."),
        ({"max_tokens": 5}, "max_tokens", "max_output_tokens"),
        ({"response_format": {"type": "json_object"}}, "response_format", "`text`"),
    ],
)
async def test_what_is_refused_names_its_field(tmp_path: Path, body: dict[str, Any], param: str, said: str) -> None:
    async with batch_app(tmp_path, [replica()]) as client:
        error = await refusal(client, body)
        assert (error["param"], said in error["message"]) == (param, True), error


async def test_queries_are_checked(tmp_path: Path) -> None:
    async with batch_app(tmp_path, [replica()]) as client:
        response = await post(client, {})
        for query in ("starting_after=3", "stream=maybe", "stream=true&starting_after=x", "streem=true"):
            answer = await client.get(f"{PATH}/{response['id']}?{query}")
            assert answer.status == 400, query
        assert (await client.get(f"{PATH}/resp_0")).status == 404
        assert (await client.get(f"{PATH}/a%20b")).status == 404
        answer = await client.get(f"{PATH}/{response['id']}/input_items?after=nothing")
        assert (await answer.json())["error"]["param"] == "after"
        ended = await client.post(f"{PATH}/{response['id']}/cancel")
        assert ended.status == 400 and (await ended.json())["error"]["code"] == "response_ended"


async def test_a_response_that_fails_says_why(tmp_path: Path) -> None:
    """Whole: the status of the failure. In the store: status failed, and what was generated."""

    def script(request: Any) -> list[Any]:
        begun = tokens(ANSWER)(request)[:1]
        failed = TokenDelta(request_id=request.request_id, finish_reason=FinishReason.ERROR, error="It broke.")
        return [msgspec.structs.replace(begun[0], finish_reason=None), failed]

    async with batch_app(tmp_path, [FakeReplica(script, max_model_len=256)]) as client:
        response = await client.post(PATH, json={"model": "demo", "input": "x"})
        assert response.status == 500 and "It broke." in (await response.json())["error"]["message"]
        events = [read(event) async for event in create_stream(client, {})]
        last = events[-1]
        assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
        assert last["response"]["error"] == {"code": "server_error", "message": "It broke."}
        assert [read(event) for event in await again(client, last["response"]["id"])] == events
        error = await refusal(client, {"input": "x", "model": "other"}, status=404)
        assert error["code"] == "model_not_found"


async def test_a_deadline_ends_a_stored_response(tmp_path: Path) -> None:
    async with batch_app(tmp_path, [replica(hold_after=0)]) as client:
        headers = {"X-Request-Timeout": "0.2"}
        response = await client.post(PATH, json={"model": "demo", "input": "x"}, headers=headers)
        assert (response.status, (await response.json())["error"]["code"]) == (504, "deadline_exceeded")
