"""The fields of /v1/chat/completions alone, its messages and tools included. What it shares with completions is in test_generation.py."""

import asyncio
import json
from typing import Any

import pytest
from support.clients.api_fields import CHAT, QUESTION, Api, Row, refused
from support.servers.live_replica import TEMPLATE, TOKENIZER

from cluster.text.chat.template import Message

PATHS = (CHAT,)
EOS = 2
TURNS = [("system", "Be brief."), ("user", "a"), ("assistant", "b"), ("user", "c")]
NUMBER = {
    "type": "object",
    "properties": {"a": {"type": "integer", "maximum": 9, "minimum": 0}},
    "required": ["a"],
    "additionalProperties": False,
}
ADD = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": NUMBER}}
SUB = {"type": "function", "function": {"name": "sub", "parameters": NUMBER}}
# A schema that cannot be enforced completely.
LOOSE = {"type": "object", "properties": {"a": {"type": "string", "contentEncoding": "base64", "not": {"const": "x"}}}}
CALLING: dict[str, Any] = {"tools": [ADD], "tool_choice": "required", "max_tokens": 100, "parallel_tool_calls": False}


async def calls_of(api: Api, **fields: Any) -> list[dict[str, Any]]:
    return (await api.run(**CALLING | fields)).choice["message"]["tool_calls"]


def conversation(content: Any) -> list[dict[str, Any]]:
    return [{"role": role, "content": content(text)} for role, text in TURNS]


async def becomes_the_templates_prompt(api: Api, messages: list[dict[str, Any]]) -> None:
    expected = TEMPLATE.encode([Message(role, text) for role, text in TURNS]).token_ids
    assert await api.prompt_ids(messages) == expected


async def joins_the_parts_with_blank_lines(api: Api, role: str) -> None:
    """As mistral-common does. value: the role of the first message."""
    turns = conversation(lambda text: [{"type": "text", "text": text}, {"type": "input_text", "text": "more"}, "end"])
    turns[0]["role"] = role
    expected = TEMPLATE.encode([Message(role, f"{text}\n\nmore\n\nend") for role, text in TURNS]).token_ids
    assert await api.prompt_ids(turns) == expected


async def is_continued(api: Api, prefix: bool) -> None:
    turns = [*QUESTION, {"role": "assistant", "content": "def f(", "prefix": prefix}]
    expected = TEMPLATE.encode([Message("user", QUESTION[0]["content"]), Message("assistant", "def f(", prefix=True)])
    assert await api.prompt_ids(turns) == expected.token_ids
    del turns[1]["prefix"]
    assert await api.prompt_ids(turns) == [*expected.token_ids, EOS], "without it, the message is complete"


async def is_the_text_if_there_is_no_content(api: Api, refusal: str) -> None:
    expected = await api.prompt_ids([*QUESTION, {"role": "assistant", "content": refusal}, *QUESTION])
    for content in (None, "", [{"type": "refusal", "refusal": refusal}]):
        turn = {"role": "assistant", "content": content, "refusal": None if content else refusal}
        assert await api.prompt_ids([*QUESTION, turn, *QUESTION]) == expected


async def is_accepted(api: Api, name: str) -> None:
    """The demo model's template does not read names; tests/cluster/text/chat has one that does."""
    turns = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    for system in ("system", "developer"):
        turns[0]["role"] = system
        assert await api.prompt_ids([turn | {"name": name} for turn in turns]) == await api.prompt_ids(turns)


async def continues_the_last_message(api: Api, continue_final_message: bool) -> None:
    turn = {"role": "assistant", "content": "def f("}
    fields = {"continue_final_message": continue_final_message, "add_generation_prompt": False}
    expected = await api.prompt_ids([*QUESTION, turn | {"prefix": True}])
    assert await api.prompt_ids([*QUESTION, turn], **fields) == expected
    fields["add_generation_prompt"] = True
    await api.refused({"messages": [*QUESTION, turn]} | fields, "add_generation_prompt", "cannot be combined")
    await api.refused({"continue_final_message": True}, "continue_final_message", "of the assistant")


async def goes_to_the_template(api: Api, variables: dict[str, Any]) -> None:
    """The demo model's template has no variables; tests/cluster/text/chat has one that does."""
    assert await api.prompt_ids(QUESTION, chat_template_kwargs=variables) == await api.prompt_ids(QUESTION)


async def binds_the_text_while_tools_bind_the_calls(api: Api, response_format: dict[str, Any]) -> None:
    fields = {"tools": [ADD], "response_format": response_format, "temperature": 1.5, "max_tokens": 100}
    bias = {"logit_bias": {str(TOKENIZER.tool_calls_token_id): 100}}
    for seed in range(2):
        text = (await api.run(**fields, seed=seed)).choice["message"]["content"]
        assert json.loads(text)["a"] in range(10)
        message = (await api.run(**fields, **bias, seed=seed)).choice["message"]
        assert message["tool_calls"][0]["function"]["name"] == "add"
        assert message["content"] is None
        chunks = await api.chunks(**fields, seed=seed)
        assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks) == text
    assert (await calls_of(api, response_format=response_format))[0]["function"]["name"] == "add"


async def limits_the_output(api: Api, max_completion_tokens: int) -> None:
    output = await api.run(max_tokens=None, max_completion_tokens=max_completion_tokens)
    assert output.usage["completion_tokens"] == max_completion_tokens
    await api.refused({"max_completion_tokens": max_completion_tokens}, "max_tokens", "differ")


async def shows_logprobs(api: Api, logprobs: bool) -> None:
    assert (await api.run()).choice["logprobs"] is None
    choice = (await api.run(logprobs=logprobs)).choice
    content = choice["logprobs"]["content"]
    assert "".join(t["token"] for t in content).lstrip(" ") == choice["message"]["content"].lstrip(" ")
    assert all(t["top_logprobs"] == [] for t in content)


async def shows_the_likeliest_tokens(api: Api, top_logprobs: int) -> None:
    for entry in (await api.run(logprobs=True, top_logprobs=top_logprobs)).choice["logprobs"]["content"]:
        assert entry["logprob"] == max(t["logprob"] for t in entry["top_logprobs"])
        assert len(entry["top_logprobs"]) == top_logprobs


async def adds_the_safety_prompt(api: Api, safe_prompt: bool) -> None:
    text = TOKENIZER.decode(await api.prompt_ids(QUESTION, safe_prompt=safe_prompt))
    assert "Always assist with care, respect, and truth" in text
    assert "Always assist" not in TOKENIZER.decode(await api.prompt_ids(QUESTION, safe_prompt=False))


async def is_called(api: Api, tool: dict[str, Any]) -> None:
    for seed in range(2):
        (call,) = await calls_of(api, tools=[tool], temperature=1, seed=seed)
        assert call["type"] == "function"
        assert call["function"]["name"] == tool["function"]["name"]
        assert list(json.loads(call["function"]["arguments"])) == ["a"]


async def is_in_the_prompt(api: Api, words: tuple[str, ...]) -> None:
    text = TOKENIZER.decode(await api.prompt_ids(QUESTION, tools=[ADD]))
    assert all(word in text for word in words)


async def is_loosened(api: Api, strict: bool) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": LOOSE, "strict": strict}}
    await api.run(**CALLING | {"tools": [tool], "max_tokens": 5})


async def is_enforced_or_refused(api: Api, strict: bool) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": LOOSE, "strict": strict}}
    await api.refused(CALLING | {"tools": [tool], "max_tokens": 5}, "tools", "f")


async def is_the_one_called(api: Api, name: str) -> None:
    named = {"type": "function", "function": {"name": name}}
    output = await api.run(**CALLING | {"tools": [ADD, SUB], "tool_choice": named, "temperature": 1, "seed": 4})
    (call,) = output.choice["message"]["tool_calls"]
    assert call["function"]["name"] == name
    assert output.choice["finish_reason"] == "tool_calls"


async def hides_the_tools(api: Api, choice: str) -> None:
    message = (await api.run(tools=[ADD, SUB], tool_choice=choice)).choice["message"]
    assert message == (await api.run()).choice["message"]
    assert "tool_calls" not in message


async def leaves_the_choice_to_the_model(api: Api, choice: str) -> None:
    bias = {str(TOKENIZER.tool_calls_token_id): 100}
    assert await calls_of(api, tools=[ADD, SUB], tool_choice=choice, logit_bias=bias)
    assert "tool_calls" not in (await api.run(tools=[ADD, SUB], tool_choice=choice)).choice["message"]


async def allows_one_call(api: Api, parallel: bool) -> None:
    fields = {"temperature": 1.5, "parallel_tool_calls": parallel}
    calls = await asyncio.gather(*(calls_of(api, seed=seed, **fields) for seed in range(4)))
    assert [len(found) for found in calls] == [1] * 4


async def allows_several_calls(api: Api, parallel: bool) -> None:
    fields = {"temperature": 1.5, "parallel_tool_calls": parallel, "max_tokens": 300}
    for seed in range(8):
        if len(await calls_of(api, seed=seed, **fields)) > 1:
            return
    pytest.fail("each answer has one call only")


async def reaches_the_prompt(api: Api, fields: dict[str, Any]) -> None:
    """value: what a tool message has besides the call's id."""
    (call,) = await calls_of(api)
    turns = [
        *QUESTION,
        {"role": "assistant", "content": None, "tool_calls": [call | {"index": 0}]},
        {"role": "tool", "tool_call_id": call["id"]} | fields,
    ]
    text = TOKENIZER.decode(await api.prompt_ids(turns))
    assert all(word in text for word in ("add", call["function"]["arguments"], fields["content"], call["id"]))
    turns[2] = turns[2] | {"tool_call_id": "unknown00"}
    await api.refused({"messages": turns}, "messages", "'tool_call_id'")
    as_object = call["function"] | {"arguments": json.loads(call["function"]["arguments"])}
    turns[1] = turns[1] | {"tool_calls": [call | {"function": as_object}]}
    turns[2] = turns[2] | {"tool_call_id": call["id"], "content": None}
    await api.prompt_ids(turns)


async def must_be_a_function(api: Api, kind: str) -> None:
    (call,) = await calls_of(api)
    turns = [*QUESTION, {"role": "assistant", "content": "", "tool_calls": [call | {"type": kind}]}]
    await api.refused({"messages": turns}, "messages", "type")


def part(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [fields]}]}


PLAIN = conversation(lambda text: text)
PARTS = conversation(lambda text: [{"type": "text", "text": text}])
DEVELOPER = [turn | {"role": turn["role"].replace("system", "developer")} for turn in PARTS]
ROWS = [
    Row("ChatRequest.messages", PLAIN, becomes_the_templates_prompt),
    Row(
        "SystemMessage.content, UserMessage.content, AssistantMessage.content, TextPart.text",
        PARTS,
        becomes_the_templates_prompt,
    ),
    Row("DeveloperMessage.content", DEVELOPER, becomes_the_templates_prompt),
    Row("SystemMessage.content", "system", joins_the_parts_with_blank_lines),
    Row("DeveloperMessage.content", "developer", joins_the_parts_with_blank_lines),
    Row("TextPart.text", part(text="x"), refused("type")),
    Row("TextPart.text", part(type="image_url", text="x"), refused("parts of text")),
    Row("AssistantMessage.prefix", True, is_continued),
    Row("AssistantMessage.refusal, RefusalPart.refusal", "no", is_the_text_if_there_is_no_content),
    Row("SystemMessage.name, DeveloperMessage.name, UserMessage.name, AssistantMessage.name", "Ann", is_accepted),
    Row("ChatRequest.continue_final_message, ChatRequest.add_generation_prompt", True, continues_the_last_message),
    Row("ChatRequest.chat_template_kwargs", {"enable_thinking": False}, goes_to_the_template),
    Row("ChatRequest.max_completion_tokens", 3, limits_the_output),
    Row("ChatRequest.logprobs", True, shows_logprobs),
    Row("ChatRequest.top_logprobs", 2, shows_the_likeliest_tokens),
    Row("ChatRequest.top_logprobs", {"top_logprobs": 2}, refused("needs 'logprobs'")),
    Row("ChatRequest.safe_prompt", True, adds_the_safety_prompt),
    Row("ChatRequest.tools, Tool.function, FunctionDefinition.name", ADD, is_called),
    Row("ChatRequest.tools", {"tools": [ADD, ADD]}, refused("same name")),
    Row(
        "ChatRequest.tools",
        {"type": "json_schema", "json_schema": {"name": "n", "schema": NUMBER}},
        binds_the_text_while_tools_bind_the_calls,
    ),
    Row("Tool.type", {"tools": [ADD | {"type": "x"}]}, refused("type")),
    Row("FunctionDefinition.description, FunctionDefinition.parameters", ("Adds.", "maximum"), is_in_the_prompt),
    Row("FunctionDefinition.strict", False, is_loosened),
    Row("FunctionDefinition.strict", True, is_enforced_or_refused),
    Row("ChatRequest.tool_choice", "none", hides_the_tools),
    Row("ChatRequest.tool_choice", "auto", leaves_the_choice_to_the_model),
    Row("ChatRequest.tool_choice", {"tool_choice": "required"}, refused("'tools'")),
    Row("ChatRequest.tool_choice", {"tool_choice": "any"}, refused("'tools'")),
    Row("NamedToolChoice.function", "add", is_the_one_called),
    Row("FunctionChoice.name", "sub", is_the_one_called),
    Row(
        "FunctionChoice.name",
        {"tool_choice": {"type": "function", "function": {"name": "mul"}}},
        refused("not one of the tools", tools=[ADD, SUB]),
    ),
    Row(
        "NamedToolChoice.type",
        {"tool_choice": {"type": "x", "function": {"name": "add"}}},
        refused("type", tools=[ADD]),
    ),
    Row("ChatRequest.parallel_tool_calls", False, allows_one_call),
    Row("ChatRequest.parallel_tool_calls", True, allows_several_calls),
    Row(
        "AssistantMessage.tool_calls, ToolCall.id, ToolCall.index, ToolCall.function, FunctionCall.name, FunctionCall.arguments, "
        "ToolMessage.content, ToolMessage.tool_call_id, ToolMessage.name",
        {"content": "it is 42", "name": "add"},
        reaches_the_prompt,
    ),
    Row("ToolCall.type", "x", must_be_a_function),
]


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("row", ROWS, ids=str)
async def test_field(api: Api, row: Row) -> None:
    await row.prove(api, row.value)
