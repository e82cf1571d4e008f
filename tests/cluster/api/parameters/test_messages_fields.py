"""The fields of /v1/messages and /v1/messages/count_tokens. Most act as a field of chat does: the answers are compared."""

import json
from typing import Any

import pytest
from support.clients.api_fields import CHAT, QUESTION, Api, Output, Row

PATHS = ("/v1/messages", "/v1/messages/count_tokens")
COUNT = PATHS[1]
BASE = {"model": "demo", "messages": QUESTION, "max_tokens": 8, "temperature": 0}
NUMBER = {
    "type": "object",
    "properties": {"a": {"type": "integer", "maximum": 9, "minimum": 0}},
    "required": ["a"],
    "additionalProperties": False,
}
TOOLS = [
    {"name": "add", "description": "Adds.", "input_schema": NUMBER, "strict": True, "type": "custom"},
    {"name": "sub", "input_schema": NUMBER},
]
CHAT_TOOLS = [
    {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": NUMBER, "strict": True}},
    {"type": "function", "function": {"name": "sub", "parameters": NUMBER}},
]
CALLING = {"tools": TOOLS, "tool_choice": {"type": "any", "disable_parallel_tool_use": True}, "max_tokens": 100}
CHAT_CALLING = {"tools": CHAT_TOOLS, "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 100}
LOOSE = {"type": "object", "properties": {"a": {"type": "string", "contentEncoding": "base64", "not": {"const": "x"}}}}


def text_in(message: dict[str, Any]) -> str:
    return "".join(block.get("text", "") for block in message["content"])


async def acts_as_in_chat(api: Api, value: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """value: the fields of the message, and those of chat."""
    fields, chat_fields = value
    message = await api.post(BASE | fields)
    chat = Output(await api.post(BASE | chat_fields, path=CHAT))
    answer = chat.choice["message"]
    assert text_in(message) == (answer["content"] or "")
    calls = [(b["name"], b["input"]) for b in message["content"] if b["type"] == "tool_use"]
    assert calls == [
        (c["function"]["name"], json.loads(c["function"]["arguments"])) for c in answer.get("tool_calls") or ()
    ]
    usage = message["usage"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == chat.usage["prompt_tokens"]
    assert usage["output_tokens"] == chat.usage["completion_tokens"]


def same(**fields: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """A field that has chat's name."""
    return fields, fields


async def is_accepted(api: Api, fields: dict[str, Any]) -> None:
    """It changes no answer, and nothing is noted."""
    response = await api.client.post(api.path, json=BASE | fields)
    assert response.status == 200 and "X-Tramontane-Ignored" not in response.headers
    assert text_in(await response.json()) == text_in(await api.post(BASE))


async def is_noted(api: Api, value: tuple[dict[str, Any], str]) -> None:
    fields, path = value
    response = await api.client.post(api.path, json=BASE | fields)
    assert (response.status, response.headers["X-Tramontane-Ignored"]) == (200, path)


async def is_refused(api: Api, value: tuple[dict[str, Any], str | None, str]) -> None:
    fields, param, words = value
    await api.refused(BASE | fields, param, words)


async def streams(api: Api, fields: dict[str, Any]) -> None:
    response = await api.client.post(api.path, json=BASE | fields)
    events = [json.loads(line[6:]) for line in (await response.text()).split("\n") if line.startswith("data: ")]
    deltas = [event["delta"]["text"] for event in events if event["type"] == "content_block_delta"]
    assert "".join(deltas) == text_in(await api.post(BASE))


async def is_a_conversation(api: Api, system: Any) -> None:
    blocks = [
        {"type": "thinking", "thinking": "hm", "signature": "s"},
        {"type": "redacted_thinking", "data": "x"},
        {"type": "text", "text": "b"},
        {"type": "tool_use", "id": "abc123def", "name": "add", "input": {"a": 1}},
    ]
    result = {"type": "tool_result", "tool_use_id": "abc123def", "content": [{"type": "text", "text": "1"}]}
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": blocks},
        {"role": "user", "content": [result, {"type": "text", "text": "c"}]},
    ]
    call = {"id": "abc123def", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    chat = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "abc123def", "content": "1"},
        {"role": "user", "content": "c"},
    ]
    fields = {"messages": messages, "system": system}
    await acts_as_in_chat(api, (fields, {"messages": chat}))
    counted = await api.post({"model": "demo", **fields}, path=COUNT)
    assert counted["input_tokens"] == len(await api.prompt_ids(chat))


async def calls_only(api: Api, name: str) -> None:
    message = await api.post(BASE | CALLING | {"tool_choice": {"type": "tool", "name": name}})
    assert {block["name"] for block in message["content"]} == {name}
    message = await api.post(BASE | CALLING | {"tool_choice": {"type": "none"}, "max_tokens": 8})
    assert {block["type"] for block in message["content"]} == {"text"}


async def follows_the_schema(api: Api, schema: dict[str, Any]) -> None:
    fields = {"output_config": {"format": {"type": "json_schema", "schema": schema}}, "max_tokens": 60}
    assert json.loads(text_in(await api.post(BASE | fields)))["a"] in range(10)


async def is_found(api: Api, _: Any) -> None:
    text = text_in(await api.post(BASE))
    stop = text[3:5]
    message = await api.post(BASE | {"stop_sequences": ["@@@", stop]})
    assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", stop)
    assert text_in(message) == text[: text.index(stop)]


SEEDED = {"temperature": 1.5, "seed": 5}
IMAGE = [{"role": "user", "content": [{"type": "image"}]}]
ROWS = [
    Row("MessagePrompt.model", same(model="demo"), acts_as_in_chat),
    Row("MessagePrompt.messages, MessagePrompt.system", "Be kind.", is_a_conversation),
    Row("MessageInput.role, MessageInput.content, TextBlockInput.text", [{"type": "text", "text": "Be kind."}],
        is_a_conversation),
    Row("ToolUseBlockInput.id, ToolUseBlockInput.name, ToolUseBlockInput.input, ToolResultBlockInput.tool_use_id, "
        "ToolResultBlockInput.content, ThinkingBlockInput.thinking, ThinkingBlockInput.signature, "
        "RedactedThinkingBlockInput.data", "Be kind.", is_a_conversation),
    Row("MessagePrompt.messages", ({"messages": IMAGE}, "messages", "'image'"), is_refused),
    Row("MessagePrompt.tools, MessagePrompt.tool_choice, MessageToolChoice.disable_parallel_tool_use",
        (CALLING, CHAT_CALLING), acts_as_in_chat),
    Row("MessageTool.name, MessageTool.input_schema, MessageTool.description, MessageTool.type, MessageTool.strict",
        (CALLING, CHAT_CALLING), acts_as_in_chat),
    Row("MessageTool.strict", ({"tools": [{"name": "f", "input_schema": LOOSE, "strict": True}]}, "tools", "f"), is_refused),
    Row("MessageToolChoice.type, MessageToolChoice.name", "sub", calls_only),
    Row("MessagePrompt.thinking, Thinking.type", {"thinking": {"type": "disabled"}}, is_accepted),
    Row("Thinking.type, Thinking.budget_tokens, Thinking.display",
        ({"thinking": {"type": "enabled", "budget_tokens": 1024, "display": "omitted"}}, "thinking"), is_noted),
    Row("MessagePrompt.output_config, OutputConfig.format, JsonOutput.type, JsonOutput.schema", NUMBER, follows_the_schema),
    Row("OutputConfig.effort", ({"output_config": {"effort": "low"}}, "output_config.effort"), is_noted),
    Row("MessagePrompt.thread", ({"thread": {"type": "create"}}, "thread", "the whole conversation"), is_refused),
    Row("MessageRequest.max_tokens", same(max_tokens=5), acts_as_in_chat),
    Row("MessageRequest.stream", {"stream": True}, streams),
    Row("MessageRequest.stop_sequences", None, is_found),
    Row("MessageRequest.temperature, MessageRequest.seed", same(**SEEDED), acts_as_in_chat),
    Row("MessageRequest.top_p", same(**SEEDED, top_p=0.5), acts_as_in_chat),
    Row("MessageRequest.top_k", same(**SEEDED, top_k=3), acts_as_in_chat),
    Row("MessageRequest.min_p", same(**SEEDED, min_p=0.3), acts_as_in_chat),
    Row("MessageRequest.repetition_penalty", same(repetition_penalty=5.0), acts_as_in_chat),
    Row("MessageRequest.ignore_eos", same(ignore_eos=True, max_tokens=30), acts_as_in_chat),
    Row("MessageRequest.metadata, MessageMetadata.user_id", {"metadata": {"user_id": "u"}}, is_accepted),
    Row("MessageRequest.priority", {"priority": 5}, is_accepted),
]  # fmt: skip


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("path", PATHS[:1])
@pytest.mark.parametrize("row", ROWS, ids=str)
async def test_field(api: Api, row: Row) -> None:
    await row.prove(api, row.value)
