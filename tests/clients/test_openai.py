"""The official client, synchronous and asynchronous, against a real server: all kinds of responses, streams, tool calls and errors.

Seeds and schemas make the demo model's nonsense predictable; no test depends on the quality of its output.
"""

import asyncio
import base64
import json
import math
import struct
import time
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel, Field
from support.servers.system_server import API_KEY

pytestmark = pytest.mark.system

MODEL = "demo_model"
PROMPT = "def fibonacci(n):"
CHAT = [{"role": "user", "content": "What does os.path.join do?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
CLOCK = {
    "type": "function",
    "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}},
}


class Animal(BaseModel):
    name: Literal["cat", "dog"]
    legs: int = Field(ge=0, le=9)
    tags: list[Literal["wild", "tame"]] = Field(max_length=2)


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=API_KEY, max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture
async def async_client(server):
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=API_KEY, max_retries=0, timeout=60) as client:
        yield client


def assemble(chunks: list[Any]) -> dict[int, dict[str, Any]]:
    """By choice: the text and tool calls of all the stream's deltas, and the finish reason."""
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for part in chunk.choices:
            choice = choices.setdefault(part.index, {"content": "", "calls": {}, "finish_reason": None, "role": None})
            assert choice["finish_reason"] is None, "a delta after the finish_reason"
            choice["content"] += part.delta.content or ""
            choice["role"] = choice["role"] or part.delta.role
            choice["finish_reason"] = part.finish_reason
            for delta in part.delta.tool_calls or []:
                if delta.index not in choice["calls"]:
                    assert delta.id and delta.type == "function", "the first delta of a call names it"
                    choice["calls"][delta.index] = {"id": delta.id, "name": delta.function.name, "arguments": ""}
                else:
                    assert delta.id is None or delta.id == choice["calls"][delta.index]["id"]
                choice["calls"][delta.index]["arguments"] += delta.function.arguments or ""
    return choices


# Completions


def test_models(client):
    assert [m.id for m in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


@pytest.mark.parametrize("n", [1, 3])
def test_a_completion_stream_is_the_completion(client, n):
    options = {"model": MODEL, "prompt": PROMPT, "max_tokens": 16, "seed": 7, "n": n, "temperature": 0.8}
    whole = client.completions.create(**options)
    chunks = list(client.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    for choice in whole.choices:
        parts = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert "".join(c.text for c in parts) == choice.text
        assert [c.finish_reason for c in parts if c.finish_reason] == [choice.finish_reason]
    assert [c.index for c in whole.choices] == list(range(n))
    assert len({c.text for c in whole.choices}) == n, "each copy has its own seed"
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


def test_prompts_as_texts_and_token_ids(client):
    options = {"model": MODEL, "max_tokens": 6, "temperature": 0}
    one, two = (client.completions.create(prompt=p, **options).choices[0].text for p in (PROMPT, "import os"))
    both = client.completions.create(prompt=[PROMPT, "import os"], **options)
    assert [c.text for c in both.choices] == [one, two]
    ids = client.completions.create(prompt=[[1, 400, 500], [1, 600]], **options)
    assert client.completions.create(prompt=[1, 400, 500], **options).choices[0].text == ids.choices[0].text
    assert ids.usage.prompt_tokens == 5


def test_a_seed_determines_the_output(client):
    def say(seed: int | None) -> str:
        answer = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=24, temperature=1, seed=seed)
        return answer.choices[0].text

    assert say(11) == say(11)
    assert len({say(11), say(12), say(None), say(None)}) == 4


def test_stop_ends_the_output_before_the_string(client):
    options = {"model": MODEL, "prompt": PROMPT, "max_tokens": 40, "temperature": 0}
    text = client.completions.create(**options).choices[0].text
    stop = text[10:13]
    stopped = client.completions.create(**options, stop=[stop, "never said"]).choices[0]
    assert stopped.finish_reason == "stop"
    assert stopped.text == text[: text.index(stop)]
    streamed = list(client.completions.create(**options, stop=stop, stream=True))
    assert "".join(c.choices[0].text for c in streamed) == stopped.text


def test_completion_logprobs(client):
    answer = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=5, temperature=0, logprobs=3)
    logprobs = answer.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == 5
    assert "".join(logprobs.tokens) == answer.choices[0].text
    assert logprobs.text_offset == [sum(map(len, logprobs.tokens[:i])) for i in range(5)]
    for token, logprob, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert logprob == top[token] == max(top.values()) <= 0, "greedy sampling takes the likeliest token"


def test_echo_scores_the_prompt(client):
    answer = client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=1, temperature=0, logprobs=1, echo=True, extra_body={"ignore_eos": True}
    )
    choice = answer.choices[0]
    assert choice.text.startswith(PROMPT)
    logprobs = choice.logprobs
    assert len(logprobs.token_logprobs) == answer.usage.prompt_tokens + 1
    assert (logprobs.token_logprobs[0], logprobs.top_logprobs[0]) == (None, None)
    assert all(
        logprob <= max(top.values())
        for logprob, top in list(zip(logprobs.token_logprobs, logprobs.top_logprobs, strict=True))[1:]
    )
    assert choice.text[logprobs.text_offset[-1] :].strip() == logprobs.tokens[-1].strip()


# Chat


def test_a_chat_stream_is_the_chat(client):
    options = {"model": MODEL, "messages": CHAT, "max_tokens": 16, "n": 2, "seed": 3, "temperature": 0.9}
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    streamed = assemble(chunks)
    for choice in whole.choices:
        assert choice.message.role == streamed[choice.index]["role"] == "assistant"
        assert choice.message.content == streamed[choice.index]["content"]
        assert choice.finish_reason == streamed[choice.index]["finish_reason"]
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens


def test_chat_logprobs(client):
    answer = client.chat.completions.create(
        model=MODEL, messages=CHAT, max_tokens=5, temperature=0, logprobs=True, top_logprobs=2
    )
    entries = answer.choices[0].logprobs.content
    assert len(entries) == answer.usage.completion_tokens
    for entry in entries:
        assert len(entry.top_logprobs) == 2
        assert entry.logprob == entry.top_logprobs[0].logprob
        assert entry.token == entry.top_logprobs[0].token
        assert math.exp(entry.logprob) <= 1
        assert bytes(entry.bytes).decode() == entry.token


def test_the_stream_helper_assembles_what_create_returns(client):
    options = {
        "model": MODEL,
        "messages": CHAT,
        "max_tokens": 200,
        "seed": 5,
        "stop": "\n",
    }  # the helper needs complete output
    with client.chat.completions.stream(**options) as stream:
        events = list(stream)
        final = stream.get_final_completion()
    assert final.choices[0].message.content == client.chat.completions.create(**options).choices[0].message.content
    assert {"chunk", "content.delta", "content.done"} <= {event.type for event in events}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_tools_are_called_and_streamed(client, choice):
    tools = [WEATHER, CLOCK] if choice != "required" else [WEATHER]
    options = {"model": MODEL, "messages": CHAT, "tools": tools, "tool_choice": choice, "max_tokens": 200, "seed": 4}
    answer = client.chat.completions.create(**options, parallel_tool_calls=False)
    (call,) = answer.choices[0].message.tool_calls
    # OpenAI sends "stop" if the request named the function, "tool_calls" if the model chose it.
    assert answer.choices[0].finish_reason in ("tool_calls", "stop")
    assert call.type == "function" and call.id
    assert call.function.name == "get_weather"
    arguments = json.loads(call.function.arguments)
    assert set(arguments) == {"city", "days"}
    assert arguments["city"] in ("Oslo", "Rome") and 1 <= arguments["days"] <= 9
    chunks = list(client.chat.completions.create(**options, parallel_tool_calls=False, stream=True))
    streamed = assemble(chunks)[0]
    assert len(streamed["calls"]) == 1
    assert streamed["calls"][0]["name"] == "get_weather"
    assert json.loads(streamed["calls"][0]["arguments"]) == arguments, "the same seed gives the same arguments"
    assert streamed["finish_reason"] == answer.choices[0].finish_reason

    # Send the result back, as agents do.
    messages = [
        *CHAT,
        answer.choices[0].message,
        {"role": "tool", "tool_call_id": call.id, "content": '{"degrees": 21}'},
    ]
    follow_up = client.chat.completions.create(model=MODEL, messages=messages, tools=tools, max_tokens=8)
    assert follow_up.usage.prompt_tokens > answer.usage.prompt_tokens, "the call and its result are in the prompt"
    assert follow_up.choices[0].finish_reason


def test_auto_and_none_may_answer_with_text(client):
    options = {"model": MODEL, "messages": CHAT, "tools": [WEATHER], "max_tokens": 8, "seed": 1}
    none = client.chat.completions.create(**options, tool_choice="none").choices[0]
    assert none.message.tool_calls is None and none.message.content
    auto = client.chat.completions.create(**options, tool_choice="auto").choices[0]
    assert auto.message.content or auto.message.tool_calls


def test_parse_gives_a_pydantic_value(client):
    answer = client.chat.completions.parse(
        model=MODEL, messages=CHAT, response_format=Animal, max_tokens=200, temperature=1, seed=8
    )
    assert isinstance(answer.choices[0].message.parsed, Animal)
    with client.chat.completions.stream(
        model=MODEL, messages=CHAT, response_format=Animal, max_tokens=200, temperature=1, seed=8
    ) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == answer.choices[0].message.parsed


def test_parse_of_a_pydantic_tool(client):
    tool = openai.pydantic_function_tool(Animal)
    answer = client.chat.completions.parse(
        model=MODEL,
        messages=CHAT,
        tools=[tool],
        tool_choice="required",
        max_tokens=200,
        seed=9,
        parallel_tool_calls=False,
    )
    (call,) = answer.choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, Animal)


@pytest.mark.parametrize(
    ("response_format", "check"),
    [
        (
            {
                "type": "json_schema",
                "json_schema": {
                    "name": "flag",
                    "strict": True,
                    "schema": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
                },
            },
            lambda value: isinstance(value, list) and all(isinstance(v, bool) for v in value),
        ),
        ({"type": "json_object"}, lambda value: isinstance(value, dict)),
    ],
    ids=["json_schema", "json_object"],
)
def test_response_formats(client, response_format, check):
    answer = client.chat.completions.create(
        model=MODEL, messages=CHAT, response_format=response_format, max_tokens=300, temperature=0.5, seed=2
    )
    if answer.choices[0].finish_reason == "stop":
        assert check(json.loads(answer.choices[0].message.content))
    else:
        assert answer.choices[0].message.content.lstrip().startswith("{")


# Other endpoints


def test_embeddings_as_floats_and_as_the_clients_default(client):
    texts = ["import os", "def f(x):\n    return x"]
    encoded = client.embeddings.create(model=MODEL, input=texts)  # base64 on the wire, decoded by the client
    floats = client.embeddings.create(model=MODEL, input=texts, encoding_format="float")
    assert [e.index for e in encoded.data] == [0, 1]
    for a, b in zip(encoded.data, floats.data, strict=True):
        assert len(a.embedding) == len(b.embedding) == 256
        assert a.embedding == pytest.approx(b.embedding, rel=1e-6)
    assert encoded.data[0].embedding != encoded.data[1].embedding
    assert encoded.usage.prompt_tokens == encoded.usage.total_tokens > 2
    raw = client.embeddings.create(model=MODEL, input=texts[0], encoding_format="base64").data[0].embedding
    assert struct.unpack("<256f", base64.b64decode(raw)) == pytest.approx(encoded.data[0].embedding)
    short = client.embeddings.create(model=MODEL, input=texts[0], dimensions=10).data[0].embedding
    assert len(short) == 10 and math.hypot(*short) == pytest.approx(1)
    ids = client.embeddings.create(model=MODEL, input=[[1, 400, 500]])
    assert ids.usage.prompt_tokens == 3


def test_moderations(client):
    answer = client.moderations.create(model="omni-moderation-latest", input=["import os", "x = 1"])
    assert answer.model == MODEL and len(answer.results) == 2
    for result in answer.results:
        scores = [s for s in result.category_scores.model_dump().values() if s is not None]
        assert len(scores) >= 13 and all(0 <= s <= 1 for s in scores)
        assert result.categories.self_harm in (True, False) and 0 <= result.category_scores.sexual_minors <= 1
        assert result.flagged == any(v for v in result.categories.model_dump().values())


# Fields without effect


@pytest.mark.parametrize("stream", [False, True])
def test_fields_without_effect_are_named_in_a_header(client, stream):
    fields = {
        "reasoning_effort": "high",
        "verbosity": "low",
        "store": False,
        "metadata": {"a": "b"},
        "service_tier": "auto",
        "prompt_cache_key": "k",
        "safety_identifier": "u",
        "parallel_tool_calls": True,
        "extra_body": {"extra": 1},
    }
    messages = [CHAT[0] | {"name": "Ann"}]
    options = {"model": MODEL, "messages": messages, "max_tokens": 4, "stream": stream}
    raw = client.chat.completions.with_raw_response.create(**options, **fields)
    named = raw.headers["X-Tramontane-Ignored"].split(", ")
    assert sorted(named) == sorted([*(fields.keys() - {"extra_body"}), "extra", "messages[].name"])
    assert raw.parse()


# Errors


@pytest.mark.parametrize(
    ("error", "param", "options"),
    [
        (openai.NotFoundError, "model", {"model": "gpt-4o"}),
        (openai.BadRequestError, "temperature", {"temperature": 9}),
        (openai.BadRequestError, "max_tokens", {"max_tokens": 10**6}),
        (openai.BadRequestError, "use_beam_search", {"extra_body": {"use_beam_search": True}}),
        (openai.BadRequestError, "stop", {"stop": list("abcdefghijklmnopq")}),
        (openai.BadRequestError, "messages", {"messages": []}),
        (openai.BadRequestError, "messages", {"messages": [{"role": "user", "content": "x " * 6000}]}),
        (
            openai.BadRequestError,
            "messages",
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/y.png"}}]}
                ]
            },
        ),
        (
            openai.BadRequestError,
            "modalities",
            {"modalities": ["audio", "text"], "audio": {"voice": "x", "format": "wav"}},
        ),
    ],
)
def test_errors_become_the_clients_exceptions(client, error, param, options):
    with pytest.raises(error) as caught:
        client.chat.completions.create(**{"model": MODEL, "messages": CHAT, "max_tokens": 4, **options})
    assert caught.value.param == param
    assert caught.value.body["message"] and caught.value.type == "invalid_request_error"
    assert caught.value.request_id
    with pytest.raises(error):
        client.chat.completions.create(**{"model": MODEL, "messages": CHAT, "max_tokens": 4, **options}, stream=True)


def test_unknown_model_and_unknown_key(server, client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-4o")
    assert caught.value.code == "model_not_found"
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="no", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError) as refused,
    ):
        stranger.models.list()
    assert refused.value.body["message"]


def test_a_deadline_that_has_passed(client):
    with pytest.raises(openai.APIStatusError) as caught:
        client.completions.create(
            model=MODEL,
            prompt=PROMPT,
            max_tokens=3000,
            extra_headers={"X-Request-Timeout": "0.2"},
            extra_body={"ignore_eos": True},
        )
    assert caught.value.status_code == 504 and caught.value.code == "deadline_exceeded"


# The asynchronous client


async def test_many_async_streams_at_once(async_client):
    async def say(i: int) -> str:
        stream = await async_client.chat.completions.create(
            model=MODEL, messages=CHAT, max_tokens=8 + i, seed=i, stream=True
        )
        return "".join([c.choices[0].delta.content or "" async for c in stream if c.choices])

    together = await asyncio.gather(*map(say, range(12)))
    assert together[5] == await say(5), "other requests must not change the output"
    assert len(set(together)) > 6


async def test_async_responses(async_client):
    completion, chat, models, embedding = await asyncio.gather(
        async_client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=4),
        async_client.chat.completions.create(model=MODEL, messages=CHAT, max_tokens=4),
        async_client.models.list(),
        async_client.embeddings.create(model=MODEL, input="x"),
    )
    assert completion.usage.completion_tokens == chat.usage.completion_tokens == 4
    assert models.data[0].id == MODEL
    assert len(embedding.data[0].embedding) == 256
    with pytest.raises(openai.BadRequestError):
        await async_client.completions.create(model=MODEL, prompt=PROMPT, n=0)


async def test_a_stream_ends_when_its_client_stops_reading(async_client, server):
    stream = await async_client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=3000, stream=True, extra_body={"ignore_eos": True}
    )
    async for _ in stream:
        break
    await stream.close()
    await asyncio.to_thread(
        server.wait_for, lambda: server.metric("num_requests_running") == 0, timeout_s=10, what="abort the stream"
    )


# Batches


@pytest.mark.parametrize(
    ("endpoint", "body"),
    [
        ("/v1/completions", {"prompt": PROMPT, "max_tokens": 4}),
        ("/v1/chat/completions", {"messages": CHAT, "max_tokens": 4}),
        ("/v1/embeddings", {"input": "x"}),
    ],
)
def test_batches(client, tmp_path, endpoint, body):
    lines = [
        {"custom_id": f"{i}", "method": "POST", "url": endpoint, "body": {"model": MODEL, **body}} for i in range(3)
    ]
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    file = client.files.create(file=path, purpose="batch")
    assert client.files.wait_for_processing(file.id).status == "processed"
    batch = client.batches.create(
        input_file_id=file.id, endpoint=endpoint, completion_window="24h", metadata={"of": "a test"}
    )
    deadline = time.monotonic() + 60
    while batch.status not in ("completed", "failed", "expired", "cancelled"):
        assert time.monotonic() < deadline, batch
        time.sleep(0.05)
        batch = client.batches.retrieve(batch.id)
    assert (batch.status, batch.errors, batch.error_file_id) == ("completed", None, None)
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (3, 3, 0)
    assert (batch.model, batch.metadata) == (MODEL, {"of": "a test"})
    answers = [json.loads(line) for line in client.files.content(batch.output_file_id).iter_lines()]
    assert [answer["custom_id"] for answer in answers] == ["0", "1", "2"]
    assert all(answer["response"]["body"]["model"] == MODEL for answer in answers)
    assert batch.id in [b.id for b in client.batches.list(limit=1)]
    assert {file.id, batch.output_file_id} <= {f.id for f in client.files.list(limit=2, order="asc")}
    for file_id in (file.id, batch.output_file_id):
        assert client.files.delete(file_id).deleted


def test_an_invalid_and_a_cancelled_batch(client, tmp_path):
    with pytest.raises(openai.BadRequestError, match="'fine-tune' is not supported"):
        client.files.create(file=("a.jsonl", b"{}"), purpose="fine-tune")
    with pytest.raises(openai.NotFoundError, match="no file"):
        client.batches.create(input_file_id="file-0", endpoint="/v1/completions", completion_window="24h")
    with pytest.raises(openai.NotFoundError, match="no batch"):
        client.batches.cancel("batch_0")
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 3000, "ignore_eos": True}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}
    file = client.files.create(file=("a.jsonl", json.dumps(line).encode()), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
    assert client.batches.cancel(batch.id).status == "cancelling"
    deadline = time.monotonic() + 60
    while client.batches.retrieve(batch.id).status != "cancelled":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert client.files.delete(file.id).deleted
