"""Chat with tools in the formats of other models than v0.3, from the request to the response: calls by name, and calls between tags."""

import json
from dataclasses import dataclass
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer
from support.fakes.replica import FakeReplica, tokens
from support.vocabularies.chatml import MODEL_VOCAB_SIZE, write_chatml
from support.vocabularies.tekken import write_tekken

from cluster.api.app import make_app
from cluster.router.router import Router
from cluster.text.load import LoadedText, load_text

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}
QUESTION = {"role": "user", "content": "Weather in Rome?"}
CALLED = [("get_weather", '{"city": "Zürich"}'), ("get_weather", "{}")]
HERMES = (
    "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\\n' + (m.content or '') }}"
    "{% for c in m.tool_calls or [] %}{{ '<tool_call>' + c.function | tojson + '</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Format:
    """answer: control tokens in it are tokens. written: what the prompt has of an earlier call and its result."""

    text: LoadedText
    vocab_size: int
    eos: int
    answer: str
    written: str


@pytest.fixture(scope="module", params=["names", "tags"])
def format_(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Format:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "names":
        text = load_text(write_tekken(folder, "v13"), chat_template="auto", model_vocab_size=3040)
        answer = '[TOOL_CALLS]get_weather[ARGS]{"city": "Zürich"}[TOOL_CALLS]get_weather[ARGS]{}'
        written = '[/INST][TOOL_CALLS]get_weather[ARGS]{"city": "Rome"}</s>[TOOL_RESULTS]rain[/TOOL_RESULTS]'
        return Format(text, 3040, 2, answer, written)
    text = load_text(write_chatml(folder, template=HERMES), chat_template="auto", model_vocab_size=MODEL_VOCAB_SIZE)
    calls = ({"name": name, "arguments": json.loads(arguments)} for name, arguments in CALLED)
    answer = "\n".join(f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>" for call in calls)
    written = '{"name": "get_weather", "arguments": {"city": "Rome"}}</tool_call><|im_end|>'
    return Format(text, MODEL_VOCAB_SIZE, 32_000, answer, written)


async def ask(format_: Format, answer: str, **fields: Any) -> tuple[str, FakeReplica]:
    """The response's body, and the replica that has seen the request."""
    text = format_.text
    ids = text.tokenizer.encode_prompt(answer, add_special_tokens=False)
    script = tokens(ids, stop_token_id=format_.eos)
    replica = FakeReplica(script, vocab_size=format_.vocab_size, max_model_len=2048)
    app = make_app(router=Router([replica]), tokenizer=text.tokenizer, chat_template=text.chat_template, model_name="m")
    async with TestClient(TestServer(app)) as client:
        body = {"model": "m", "messages": [QUESTION], "tools": [TOOL]} | fields
        response = await client.post("/v1/chat/completions", json=body)
        assert response.status == 200, await response.text()
        return await response.text(), replica


def called(calls: list[dict[str, Any]]) -> list[tuple[str, str]]:
    assert len({call["id"] for call in calls}) == len(calls)
    return [(call["function"]["name"], call["function"]["arguments"]) for call in calls]


async def test_a_response(format_: Format) -> None:
    body, replica = await ask(format_, format_.answer)
    choice = json.loads(body)["choices"][0]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", None)
    assert called(choice["message"]["tool_calls"]) == CALLED
    assert replica.requests[0].sampling.grammar is not None


async def test_a_stream(format_: Format) -> None:
    body, _ = await ask(format_, format_.answer, stream=True)
    events = [json.loads(line[6:]) for line in body.splitlines() if line.startswith("data: {")]
    calls: list[dict[str, Any]] = []
    for event in events:
        for delta in event["choices"][0]["delta"].get("tool_calls") or ():
            if delta["index"] == len(calls):
                calls.append({"id": delta["id"], "function": {"name": delta["function"]["name"], "arguments": ""}})
            calls[delta["index"]]["function"]["arguments"] += delta["function"].get("arguments") or ""
    assert called(calls) == CALLED
    assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"
    assert not "".join(event["choices"][0]["delta"].get("content") or "" for event in events)


async def test_the_conversation_goes_on(format_: Format) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}
    result = {"role": "tool", "tool_call_id": "call_1", "content": "rain"}
    messages = [QUESTION, {"role": "assistant", "tool_calls": [call]}, result]
    body, replica = await ask(format_, "It rains.", messages=messages)
    choice = json.loads(body)["choices"][0]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("stop", "It rains.")
    shown = "".join(format_.text.tokenizer.token_text(i) for i in replica.requests[0].prompt_token_ids)
    assert format_.written in shown


async def test_without_tools_the_output_is_text(format_: Format) -> None:
    body, _ = await ask(format_, "It rains.", tools=None)
    assert json.loads(body)["choices"][0]["message"]["content"] == "It rains."
