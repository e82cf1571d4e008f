"""The fields of /v1/responses and /v1/responses/input_tokens. Most act as a field of chat does: the answers are compared.

This server has no store. What stored responses do is in tests/cluster/api/endpoints/responses.
"""

import json
from typing import Any

import pytest
from support.clients.api_fields import CHAT, QUESTION, Api, Output, Row

PATHS = ("/v1/responses", "/v1/responses/input_tokens")
COUNT = PATHS[1]
TEXT = QUESTION[0]["content"]
BASE = {"model": "demo", "input": TEXT, "max_output_tokens": 8, "temperature": 0}
CHAT_BASE = {"model": "demo", "messages": QUESTION, "max_tokens": 8, "temperature": 0}
NUMBER = {
    "type": "object",
    "properties": {"a": {"type": "integer", "maximum": 9, "minimum": 0}},
    "required": ["a"],
    "additionalProperties": False,
}
ADD = {"name": "add", "description": "Adds.", "parameters": NUMBER, "strict": True}
SUB = {"name": "sub", "parameters": NUMBER}
TOOLS = [{"type": "function", **ADD}, {"type": "function", **SUB}]
CHAT_TOOLS = [{"type": "function", "function": ADD}, {"type": "function", "function": SUB}]
CALLING = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False, "max_output_tokens": 100}
CHAT_CALLING = {"tools": CHAT_TOOLS, "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 100}
CALL = {"name": "add", "arguments": '{"a": 1}'}
# A schema that cannot be enforced completely.
LOOSE = {"type": "object", "properties": {"a": {"type": "string", "contentEncoding": "base64", "not": {"const": "x"}}}}


async def respond(api: Api, **fields: Any) -> dict[str, Any]:
    return await api.post(BASE | fields)


def text_in(response: dict[str, Any]) -> str:
    return "".join(part["text"] for item in response["output"] for part in item.get("content", ()))


def calls_in(response: dict[str, Any]) -> list[tuple[str, str]]:
    return [(item["name"], item["arguments"]) for item in response["output"] if item["type"] == "function_call"]


async def acts_as_in_chat(api: Api, value: tuple[dict[str, Any], dict[str, Any]]) -> dict[str, Any]:
    """value: the fields of the response, and those of chat."""
    fields, chat_fields = value
    response = await respond(api, **fields)
    chat = Output(await api.post(CHAT_BASE | chat_fields, path=CHAT))
    message = chat.choice["message"]
    assert text_in(response) == (message["content"] or "")
    calls = [(c["function"]["name"], c["function"]["arguments"]) for c in message.get("tool_calls") or ()]
    assert calls_in(response) == calls
    assert response["usage"]["input_tokens"] == chat.usage["prompt_tokens"]
    assert response["usage"]["output_tokens"] == chat.usage["completion_tokens"]
    return response


def same(**fields: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """A field that has chat's name."""
    return fields, fields


async def is_repeated(api: Api, fields: dict[str, Any]) -> None:
    response = await respond(api, **fields)
    assert {name: response[name] for name in fields} == fields


async def is_accepted(api: Api, fields: dict[str, Any]) -> None:
    """It changes no answer, and nothing is noted: it asks for what happens anyway."""
    response = await api.client.post(api.path, json=BASE | fields)
    assert response.status == 200 and "X-Tramontane-Ignored" not in response.headers
    assert text_in(await response.json()) == text_in(await respond(api))


async def is_noted(api: Api, value: tuple[dict[str, Any], str]) -> None:
    fields, path = value
    response = await api.client.post(api.path, json=BASE | fields)
    assert (response.status, response.headers["X-Tramontane-Ignored"]) == (200, path)
    assert text_in(await response.json()) == text_in(await respond(api))


async def is_refused(api: Api, value: tuple[dict[str, Any], str | None, str]) -> None:
    fields, param, words = value
    await api.refused(BASE | fields, param, words)


async def streams(api: Api, fields: dict[str, Any]) -> None:
    response = await api.client.post(api.path, json=BASE | fields)
    events = [json.loads(line[6:]) for line in (await response.text()).split("\n") if line.startswith("data: ")]
    assert "".join(e.get("delta", "") for e in events) == text_in(await respond(api)) == text_in(events[-1]["response"])


async def shows_log_probabilities(api: Api, count: int) -> None:
    fields = {"include": ["message.output_text.logprobs"], "top_logprobs": count}
    response = await respond(api, **fields)
    chat = Output(await api.post(CHAT_BASE | {"logprobs": True, "top_logprobs": count}, path=CHAT))
    own = response["output"][0]["content"][0]["logprobs"]
    assert [(one["token"], one["logprob"]) for one in own] == [
        (one["token"], one["logprob"]) for one in chat.choice["logprobs"]["content"]
    ]
    assert all(len(one["top_logprobs"]) == count for one in own)
    await is_noted(api, ({"top_logprobs": count}, "top_logprobs"))


async def follows_the_schema(api: Api, schema: dict[str, Any]) -> None:
    named = {"type": "json_schema", "name": "n", "description": "d", "schema": schema}
    for strict in (None, True, False):
        response = await respond(api, text={"format": named | {"strict": strict}}, max_output_tokens=60)
        assert json.loads(text_in(response))["a"] in range(10)
        assert response["text"]["format"]["schema"] == schema
    loose = {"type": "json_object"}
    fields = {"text": {"format": loose}, "max_output_tokens": 60}
    await acts_as_in_chat(api, (fields, {"response_format": loose, "max_tokens": 60}))


async def calls_only(api: Api, name: str) -> None:
    for choice in (
        {"type": "function", "name": name},
        {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": name}]},
    ):
        response = await respond(api, **CALLING | {"tool_choice": choice})
        assert {called for called, _ in calls_in(response)} == {name}
        assert response["tool_choice"] == choice
    allowed = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "nobody"}]}
    await api.refused(BASE | {"tools": TOOLS, "tool_choice": allowed}, "tool_choice", "'nobody'")


async def is_a_conversation(api: Api, extra: dict[str, Any]) -> None:
    """extra: what an item may carry besides, without any meaning."""
    items = [
        {"role": "developer", "content": "Be kind."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}], **extra},
        {
            "type": "reasoning",
            "id": "rs_1",
            "summary": [],
            "content": [],
            "encrypted_content": "x",
            "status": "completed",
        },
        {"role": "assistant", "content": [{"type": "output_text", "text": "b"}], **extra, "phase": "final_answer"},
        {"type": "function_call", "call_id": "abc123def", **CALL, **extra},
        {"type": "function_call_output", "call_id": "abc123def", "output": "1", "name": "add", **extra},
        {"type": "message", "role": "user", "content": "c"},
    ]
    call = {"id": "abc123def", "type": "function", "function": CALL}
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "abc123def", "content": "1"},
        {"role": "user", "content": "c"},
    ]
    await acts_as_in_chat(api, ({"input": items}, {"messages": messages}))


async def counts(api: Api, fields: dict[str, Any]) -> None:
    response = await respond(api, **fields)
    body = {"model": "demo", "input": TEXT} | fields
    counted = await api.post(body, path=COUNT)
    assert counted == {"object": "response.input_tokens", "input_tokens": response["usage"]["input_tokens"]}


NO_STORE = "stores no responses"
SEEDED = {"temperature": 1.5, "seed": 5}
ROWS = [
    Row("ResponseInput.model", ({"model": "demo"}, {}), acts_as_in_chat),
    Row("ResponseInput.input", {"id": "x_1", "status": "completed"}, is_a_conversation),
    Row("InputMessage.role, InputMessage.content, InputMessage.id, InputMessage.status, InputMessage.phase", {"id": "x"},
        is_a_conversation),
    Row("InputFunctionCall.call_id, InputFunctionCall.name, InputFunctionCall.arguments, InputFunctionCall.id, "
        "InputFunctionCall.status", {}, is_a_conversation),
    Row("InputFunctionOutput.call_id, InputFunctionOutput.output, InputFunctionOutput.id, InputFunctionOutput.status, "
        "InputFunctionOutput.name", {}, is_a_conversation),
    Row("InputReasoning.id, InputReasoning.summary, InputReasoning.content, InputReasoning.encrypted_content, "
        "InputReasoning.status", {}, is_a_conversation),
    Row("ResponseInput.input", ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input", "images"),
        is_refused),
    Row("ResponseInput.instructions",
        ({"instructions": "Be kind."}, {"messages": [{"role": "system", "content": "Be kind."}, *QUESTION]}), acts_as_in_chat),
    Row("ResponseInput.instructions, ResponseInput.tools", {"instructions": "Be kind.", "tools": TOOLS}, counts),
    Row("ResponseInput.previous_response_id", ({"previous_response_id": "resp_1"}, None, NO_STORE), is_refused),
    Row("ResponseInput.tools, ResponseInput.parallel_tool_calls, ResponseInput.tool_choice", (CALLING, CHAT_CALLING),
        acts_as_in_chat),
    Row("ResponseTool.type, ResponseTool.name, ResponseTool.description, ResponseTool.parameters, ResponseTool.strict",
        (CALLING, CHAT_CALLING), acts_as_in_chat),
    Row("ResponseTool.strict", ({"tools": [{"type": "function", "name": "f", "parameters": LOOSE, "strict": True}]},
                                "tools", "f"), is_refused),
    Row("ResponseInput.tool_choice, FunctionToolChoice.name, AllowedTools.mode, AllowedTools.tools, AllowedTool.type, "
        "AllowedTool.name", "sub", calls_only),
    Row("ResponseInput.text, TextConfig.format, TextSchemaFormat.name, TextSchemaFormat.schema, "
        "TextSchemaFormat.description, TextSchemaFormat.strict", NUMBER, follows_the_schema),
    Row("TextConfig.verbosity", ({"text": {"verbosity": "low"}}, "text.verbosity"), is_noted),
    Row("ResponseInput.reasoning, Reasoning.effort", {"reasoning": {"effort": "none"}}, is_accepted),
    Row("Reasoning.effort", ({"reasoning": {"effort": "high"}}, "reasoning.effort"), is_noted),
    Row("Reasoning.summary", ({"reasoning": {"summary": "auto"}}, "reasoning.summary"), is_noted),
    Row("Reasoning.generate_summary", ({"reasoning": {"generate_summary": "auto"}}, "reasoning.summary"), is_noted),
    Row("ResponseInput.truncation", {"truncation": "auto"}, is_repeated),
    Row("ResponseInput.truncation", ({"input": "x y " * 2000, "truncation": "auto"}, "input", "context length"), is_refused),
    Row("ResponseRequest.stream", {"stream": True}, streams),
    Row("ResponseRequest.stream_options", ({"stream_options": {"include_usage": True}}, "stream_options"), is_noted),
    Row("ResponseRequest.store", {"store": False}, is_repeated),
    Row("ResponseRequest.store", ({"store": True}, None, NO_STORE), is_refused),
    Row("ResponseRequest.background", ({"background": True}, None, NO_STORE), is_refused),
    Row("ResponseRequest.metadata", {"metadata": {"a": "b"}}, is_repeated),
    Row("ResponseRequest.include, ResponseRequest.top_logprobs", 2, shows_log_probabilities),
    Row("ResponseRequest.include", ({"include": ["reasoning.encrypted_content"]}, "include"), is_noted),
    Row("ResponseRequest.max_output_tokens", ({"max_output_tokens": 5}, {"max_tokens": 5}), acts_as_in_chat),
    Row("ResponseRequest.temperature, ResponseRequest.seed", same(**SEEDED), acts_as_in_chat),
    Row("ResponseRequest.top_p", same(**SEEDED, top_p=0.5), acts_as_in_chat),
    Row("ResponseRequest.top_k", same(**SEEDED, top_k=3), acts_as_in_chat),
    Row("ResponseRequest.min_p", same(**SEEDED, min_p=0.3), acts_as_in_chat),
    Row("ResponseRequest.repetition_penalty", same(repetition_penalty=5.0), acts_as_in_chat),
    Row("ResponseRequest.presence_penalty", same(presence_penalty=2.0), acts_as_in_chat),
    Row("ResponseRequest.frequency_penalty", same(frequency_penalty=2.0), acts_as_in_chat),
    Row("ResponseRequest.stop", same(stop=["e"]), acts_as_in_chat),
    Row("ResponseRequest.min_tokens", same(min_tokens=6, stop=["e"]), acts_as_in_chat),
    Row("ResponseRequest.ignore_eos", ({"ignore_eos": True, "max_output_tokens": 30}, {"ignore_eos": True, "max_tokens": 30}),
        acts_as_in_chat),
    Row("ResponseRequest.user", {"user": "u"}, is_repeated),
    Row("ResponseRequest.priority", {"priority": 5}, is_accepted),
]  # fmt: skip


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("path", PATHS[:1])
@pytest.mark.parametrize("row", ROWS, ids=str)
async def test_field(api: Api, row: Row) -> None:
    await row.prove(api, row.value)
