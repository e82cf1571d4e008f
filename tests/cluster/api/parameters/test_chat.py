"""The fields of /v1/chat/completions alone, its messages and tools included. What it shares with completions is in test_generation.py."""

import json
from typing import Any

import pytest
from support.clients.api_fields import CHAT, QUESTION, Api, Row, refused
from support.servers.live_replica import TEMPLATE, TOKENIZER

from cluster.text.chat.template import Message

PATHS = (CHAT,)
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


async def is_continued(api: Api, prefix: bool) -> None:
    turns = [*QUESTION, {"role": "assistant", "content": "def f(", "prefix": prefix}]
    expected = TEMPLATE.encode([Message("user", QUESTION[0]["content"]), Message("assistant", "def f(", prefix=True)])
    assert await api.prompt_ids(turns) == expected.token_ids
    del turns[1]["prefix"]
    await api.refused({"messages": turns}, "messages", "prefix")


async def may_be_empty_only(api: Api, fields: dict[str, Any]) -> None:
    """value: the field with a value that is refused."""
    ((name, value),) = fields.items()
    plain = {"role": "assistant", "content": "b"}
    expected = await api.prompt_ids([*QUESTION, plain, *QUESTION])
    empty: Any = [] if name == "annotations" else None
    assert await api.prompt_ids([*QUESTION, plain | {name: empty}, *QUESTION]) == expected
    await api.refused({"messages": [*QUESTION, plain | {name: value}, *QUESTION]}, "messages", f"{name}'")


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
    for seed in range(3):
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
    calls = [await calls_of(api, temperature=1.5, seed=seed, parallel_tool_calls=parallel) for seed in range(4)]
    assert [len(found) for found in calls] == [1] * 4


async def allows_several_calls(api: Api, parallel: bool) -> None:
    fields = {"temperature": 1.5, "parallel_tool_calls": parallel, "max_tokens": 300}
    assert max([len(await calls_of(api, seed=seed, **fields)) for seed in range(8)]) > 1


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


async def must_be_a_function(api: Api, kind: str) -> None:
    (call,) = await calls_of(api)
    turns = [*QUESTION, {"role": "assistant", "content": "", "tool_calls": [call | {"type": kind}]}]
    await api.refused({"messages": turns}, "messages", "type")


def part(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [fields]}]}


PLAIN = conversation(lambda text: text)
PARTS = conversation(lambda text: [{"type": "text", "text": character} for character in text])
DEVELOPER = [turn | {"role": turn["role"].replace("system", "developer")} for turn in PARTS]
ROWS = [
    Row("ChatRequest.messages", PLAIN, becomes_the_templates_prompt),
    Row(
        "SystemMessage.content, UserMessage.content, AssistantMessage.content, TextPart.text",
        PARTS,
        becomes_the_templates_prompt,
    ),
    Row("DeveloperMessage.content", DEVELOPER, becomes_the_templates_prompt),
    Row("TextPart.type", part(text="x"), refused("type")),
    Row("TextPart.type", part(type="image_url", text="x"), refused("type")),
    Row("AssistantMessage.prefix", True, is_continued),
    Row("AssistantMessage.refusal", {"refusal": "no"}, may_be_empty_only),
    Row("AssistantMessage.audio", {"audio": {}}, may_be_empty_only),
    Row("AssistantMessage.function_call", {"function_call": {}}, may_be_empty_only),
    Row("AssistantMessage.annotations", {"annotations": [1]}, may_be_empty_only),
    Row("ChatRequest.max_completion_tokens", 3, limits_the_output),
    Row("ChatRequest.logprobs", True, shows_logprobs),
    Row("ChatRequest.top_logprobs", 2, shows_the_likeliest_tokens),
    Row("ChatRequest.top_logprobs", {"top_logprobs": 2}, refused("needs 'logprobs'")),
    Row("ChatRequest.safe_prompt", True, adds_the_safety_prompt),
    Row("ChatRequest.tools, Tool.function, FunctionDefinition.name", ADD, is_called),
    Row("ChatRequest.tools", {"tools": [ADD, ADD]}, refused("same name")),
    Row("ChatRequest.tools", {"response_format": {"type": "json_object"}}, refused("tools", **CALLING)),
    Row("Tool.type", {"tools": [ADD | {"type": "x"}]}, refused("type")),
    Row("FunctionDefinition.description, FunctionDefinition.parameters", ("Adds.", "maximum"), is_in_the_prompt),
    Row("FunctionDefinition.strict", False, is_loosened),
    Row("FunctionDefinition.strict", True, is_enforced_or_refused),
    Row("ChatRequest.tool_choice", "none", hides_the_tools),
    Row("ChatRequest.tool_choice", "auto", leaves_the_choice_to_the_model),
    Row("ChatRequest.tool_choice", {"tool_choice": "required"}, refused("'tools'")),
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
    Row("ChatRequest.parallel_tool_calls", {"parallel_tool_calls": True}, refused("'tools'")),
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
