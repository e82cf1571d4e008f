"""litellm, the way a proxy or an agent framework calls an OpenAI-compatible server: provider `openai/`, `api_base`."""

import json

import litellm
import pytest

MODEL = "openai/demo_model"
CHAT = [{"role": "user", "content": "What does os.path.join do?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Oslo", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}

litellm.telemetry = False
litellm.suppress_debug_info = True


@pytest.fixture
def options(url, key):
    return {"model": MODEL, "api_base": url, "api_key": key, "num_retries": 0, "timeout": 60}


def test_completion_and_stream(options):
    options |= {"messages": CHAT, "max_tokens": 12, "temperature": 0.8, "seed": 3}
    answer = litellm.completion(**options)
    text = answer.choices[0].message.content
    assert text and answer.usage.completion_tokens <= 12
    chunks = list(litellm.completion(**options, stream=True, stream_options={"include_usage": True}))
    rebuilt = litellm.stream_chunk_builder(chunks, messages=CHAT)
    assert rebuilt.choices[0].message.content == text
    assert rebuilt.usage.total_tokens == answer.usage.total_tokens
    assert rebuilt.choices[0].finish_reason == answer.choices[0].finish_reason


async def test_acompletion(options):
    options |= {"messages": CHAT, "max_tokens": 8, "seed": 3}
    answer = await litellm.acompletion(**options)
    stream = await litellm.acompletion(**options, stream=True)
    assert "".join([c.choices[0].delta.content or "" async for c in stream]) == answer.choices[0].message.content


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_tools(options, choice):
    options |= {"messages": CHAT, "tools": [WEATHER], "max_tokens": 200, "seed": 6}
    answer = litellm.completion(**options, tool_choice=choice, parallel_tool_calls=False)
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments)["city"] in ("Oslo", "Rome")
    chunks = list(litellm.completion(**options, tool_choice=choice, parallel_tool_calls=False, stream=True))
    (rebuilt,) = litellm.stream_chunk_builder(chunks).choices[0].message.tool_calls
    assert rebuilt.function.arguments == call.function.arguments
    result = {"role": "tool", "tool_call_id": call.id, "name": "get_weather", "content": "sunny"}
    options |= {"messages": [*CHAT, answer.choices[0].message.model_dump(), result], "max_tokens": 6}
    assert litellm.completion(**options).choices[0].finish_reason


def test_response_format(options):
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    answer = litellm.completion(
        **options,
        messages=CHAT,
        max_tokens=100,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}},
    )
    assert set(json.loads(answer.choices[0].message.content)) == {"ok"}


def test_embedding(options):
    answer = litellm.embedding(**options, input=["import os", "x = 1"])
    assert [len(item["embedding"]) for item in answer.data] == [256, 256]
    assert answer.usage.prompt_tokens > 2


def test_text_completion(options):
    options |= {"model": "text-completion-openai/demo_model", "prompt": "def fibonacci(n):", "max_tokens": 8}
    answer = litellm.text_completion(**options, temperature=0, logprobs=2)
    text = answer.choices[0].text
    assert text and len(answer.choices[0].logprobs.tokens) == 8
    chunks = list(litellm.text_completion(**options, temperature=0, stream=True))
    assert "".join(c.choices[0].text or "" for c in chunks) == text


def test_moderation(url, key):
    answer = litellm.moderation(input="import os", model="demo_model", api_base=url, api_key=key)
    assert answer.results[0].flagged in (True, False)


@pytest.mark.parametrize(
    ("error", "changes"),
    [
        (litellm.BadRequestError, {"temperature": 3}),
        (litellm.NotFoundError, {"model": "openai/other"}),
        (litellm.AuthenticationError, {"api_key": "no"}),
    ],
)
def test_errors_become_litellms_exceptions(options, error, changes):
    with pytest.raises(error):
        litellm.completion(**{**options, "messages": CHAT, "max_tokens": 4, **changes})
