"""The official client's Responses API against a real server: whole, streamed, tools, structured text, background, conversation, resumed."""

import json
import time
from typing import Literal

import openai
import pytest
from pydantic import BaseModel, Field
from support.servers.system_server import API_KEY

pytestmark = pytest.mark.system

MODEL = "demo_model"
WEATHER = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather of a city",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Oslo", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


class Animal(BaseModel):
    name: Literal["cat", "dog"]
    legs: int = Field(ge=0, le=9)


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=API_KEY, max_retries=0, timeout=60) as client:
        yield client


def create(client, **fields):
    extra = {"seed": 5, "ignore_eos": None if "tools" in fields else True} | fields.pop("extra_body", {})
    return client.responses.create(
        model=MODEL, **{"input": "def fibonacci(n):", "max_output_tokens": 12} | fields, extra_body=extra
    )


def test_whole_and_streamed_responses_agree(client):
    whole = create(client, instructions="Be brief.", metadata={"team": "a"})
    assert whole.status == "incomplete" and whole.incomplete_details.reason == "max_output_tokens"
    assert whole.usage.output_tokens == 12 and whole.usage.total_tokens == whole.usage.input_tokens + 12
    assert whole.instructions == "Be brief." and whole.metadata == {"team": "a"}
    text, types, last = "", [], None
    for number, event in enumerate(create(client, instructions="Be brief.", stream=True)):
        assert event.sequence_number == number
        types.append(event.type)
        text += event.delta if event.type == "response.output_text.delta" else ""
        last = event
    assert types[:2] == ["response.created", "response.in_progress"] and types[-1] == "response.incomplete"
    assert text == whole.output_text == last.response.output_text
    assert client.responses.retrieve(last.response.id) == last.response
    counted = client.responses.input_tokens.count(model=MODEL, input="def fibonacci(n):", instructions="Be brief.")
    assert counted.input_tokens == whole.usage.input_tokens


def test_a_lost_stream_goes_on_where_it_was(client):
    stream = create(client, stream=True, max_output_tokens=40)
    seen = [next(stream) for _ in range(7)]
    stream.close()
    response_id = seen[0].response.id
    rest = list(client.responses.retrieve(response_id, stream=True, starting_after=seen[-1].sequence_number))
    numbers = [event.sequence_number for event in seen + rest]
    assert numbers == list(range(len(numbers)))
    assert list(client.responses.retrieve(response_id, stream=True)) == seen + rest
    done = next(event for event in rest if event.type == "response.output_text.done")
    assert done.text == "".join(e.delta for e in seen + rest if e.type == "response.output_text.delta")


def test_the_stream_helper_collects_the_response(client):
    with client.responses.stream(model=MODEL, input="Hi", max_output_tokens=8, extra_body={"seed": 1}) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
    assert text


def test_functions(client):
    response = create(client, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False, max_output_tokens=300)
    [call] = response.output
    assert (call.type, call.name, call.status) == ("function_call", "get_weather", "completed")
    assert json.loads(call.arguments)["city"] in ("Oslo", "Rome")
    answer = create(
        client,
        previous_response_id=response.id,
        input=[{"type": "function_call_output", "call_id": call.call_id, "output": "12 degrees"}],
        tools=[WEATHER],
        tool_choice="none",
    )
    assert answer.previous_response_id == response.id and answer.output[0].type == "message"
    by_hand = create(
        client,
        input=[
            {"role": "user", "content": "def fibonacci(n):"},
            call.to_dict(),
            {"type": "function_call_output", "call_id": call.call_id, "output": "12 degrees"},
        ],
        tools=[WEATHER],
        tool_choice="none",
    )
    assert by_hand.output_text == answer.output_text and by_hand.usage.input_tokens == answer.usage.input_tokens
    events = list(create(client, tools=[WEATHER], tool_choice="required", max_output_tokens=300, stream=True))
    pieces = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    done = [event for event in events if event.type == "response.function_call_arguments.done"]
    assert "".join(pieces) == "".join(event.arguments for event in done) and done[0].name == "get_weather"


def test_structured_text(client):
    response = client.responses.parse(
        model=MODEL, input="An animal", text_format=Animal, max_output_tokens=60, extra_body={"seed": 3}
    )
    assert response.status == "completed"
    assert response.output_parsed.name in ("cat", "dog")


def test_background(client):
    response = create(client, background=True, max_output_tokens=30)
    assert response.status == "queued" and response.background
    while response.status in ("queued", "in_progress"):
        time.sleep(0.05)
        response = client.responses.retrieve(response.id)
    assert response.usage.output_tokens == 30
    assert response.output_text == create(client, max_output_tokens=30).output_text
    with pytest.raises(openai.BadRequestError, match="can no longer be cancelled"):
        client.responses.cancel(response.id)
    running = create(client, background=True, max_output_tokens=3000, extra_body={"priority": 5})
    cancelled = client.responses.cancel(running.id)
    assert cancelled.status == "cancelled" and client.responses.retrieve(running.id) == cancelled
    client.responses.delete(running.id)
    with pytest.raises(openai.NotFoundError, match="There is no response"):
        client.responses.retrieve(running.id)


def test_input_items_are_listed(client):
    first = create(client, input=[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
                                  {"role": "user", "content": [{"type": "input_text", "text": "c"}]}])  # fmt: skip
    items = list(client.responses.input_items.list(first.id, order="asc", limit=2))
    assert [item.content[0].text for item in items] == ["a", "b", "c"]
    assert [item.content[0].type for item in items] == ["input_text", "output_text", "input_text"]
    assert len({item.id for item in items}) == 3


def test_log_probabilities(client):
    response = create(client, include=["message.output_text.logprobs"], top_logprobs=2)
    entries = response.output[0].content[0].logprobs
    assert "".join(entry.token for entry in entries).strip() == response.output_text.strip()
    assert all(len(entry.top_logprobs) == 2 for entry in entries)


def test_a_response_that_is_not_stored(client):
    kept, passing = create(client), create(client, store=False)
    assert passing.output_text == kept.output_text and passing.store is False
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(passing.id)
    events = list(create(client, store=False, stream=True))
    assert events[-1].response.output_text == kept.output_text


def test_what_is_refused_is_refused_by_name(client):
    for fields, what in (
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "https://a/b.png"}]}]}, "images"),
        ({"tools": [{"type": "web_search"}]}, "web_search"),
        ({"previous_response_id": "resp_0"}, "resp_0"),
        ({"background": True, "store": False}, "store"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"max_output_tokens": 100_000}, "100000 for the output"),
    ):
        with pytest.raises(openai.BadRequestError, match=what):
            create(client, **fields)
    with pytest.raises(openai.NotFoundError, match="'truncation': 'auto'"):
        client.responses.compact(model=MODEL, input="x")
    raw = client.responses.with_raw_response.create(
        model=MODEL, input="x", max_output_tokens=1, reasoning={"effort": "high"}, extra_body={"reasoning_x": 1}
    )
    assert raw.headers["x-tramontane-ignored"] == "reasoning_x, reasoning.effort"
