"""mistralai as Mistral's documentation uses it: chat, streams, tools, embeddings, models, moderations and files."""

import json

import pytest
from mistralai.client import Mistral
from mistralai.client.errors import SDKError

MODEL = "demo_model"
QUESTION = [{"role": "user", "content": "What is the best French cheese?"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "retrieve_payment_status",
        "description": "Get payment status of a transaction",
        "parameters": {
            "type": "object",
            "properties": {"transaction_id": {"type": "string", "enum": ["T1001", "T1002"]}},
            "required": ["transaction_id"],
        },
    },
}


@pytest.fixture
def client(url, key):
    with Mistral(api_key=key, server_url=url.removesuffix("/v1"), timeout_ms=60_000) as client:
        yield client


def test_chat_and_stream(client):
    options = {"model": MODEL, "messages": QUESTION, "max_tokens": 12, "temperature": 0.7, "random_seed": 5}
    answer = client.chat.complete(**options, safe_prompt=False)
    text = answer.choices[0].message.content
    assert text and answer.usage.completion_tokens <= 12
    chunks = [event.data for event in client.chat.stream(**options)]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    assert {client.chat.complete(**{**options, "random_seed": seed}).choices[0].message.content for seed in (6, 7)} != {
        text
    }, "random_seed is the seed"


async def test_chat_and_stream_async(client):
    options = {"model": MODEL, "messages": QUESTION, "max_tokens": 8, "random_seed": 3}
    answer = await client.chat.complete_async(**options)
    stream = await client.chat.stream_async(**options)
    text = "".join([event.data.choices[0].delta.content or "" async for event in stream if event.data.choices])
    assert text == answer.choices[0].message.content


def test_a_prefix(client):
    prefix = {"role": "assistant", "content": "Dear friend,", "prefix": True}
    answer = client.chat.complete(model=MODEL, messages=[*QUESTION, prefix], max_tokens=8)
    assert answer.choices[0].message.content is not None


def test_function_calling(client):
    options = {"tool_choice": "any", "parallel_tool_calls": False, "max_tokens": 200, "random_seed": 6}
    answer = client.chat.complete(model=MODEL, messages=QUESTION, tools=[TOOL], **options)
    message = answer.choices[0].message
    (call,) = message.tool_calls
    assert call.function.name == "retrieve_payment_status"
    assert json.loads(call.function.arguments)["transaction_id"] in ("T1001", "T1002")
    result = {"role": "tool", "name": call.function.name, "content": '{"status": "Paid"}', "tool_call_id": call.id}
    answer = client.chat.complete(model=MODEL, messages=[*QUESTION, message, result], tools=[TOOL], max_tokens=6)
    assert answer.choices[0].finish_reason


def test_json_mode(client):
    answer = client.chat.complete(
        model=MODEL, messages=QUESTION, response_format={"type": "json_object"}, max_tokens=200, random_seed=1
    )
    assert answer.choices[0].finish_reason == "length" or isinstance(
        json.loads(answer.choices[0].message.content), dict
    )


def test_embeddings(client):
    answer = client.embeddings.create(model=MODEL, inputs=["import os", "x = 1"])
    assert [len(item.embedding) for item in answer.data] == [256, 256]
    assert answer.id and answer.usage.prompt_tokens > 2
    (short,) = client.embeddings.create(model=MODEL, inputs="x = 1", output_dimension=64, output_dtype="float").data
    assert len(short.embedding) == 64
    with pytest.raises(SDKError, match="output_dtype"):
        client.embeddings.create(model=MODEL, inputs="x = 1", output_dtype="int8")


def test_models(client):
    (card,) = client.models.list().data
    assert (card.id, card.type, card.max_context_length) == (MODEL, "base", 4096)
    assert card.capabilities.completion_chat and card.capabilities.function_calling
    assert not card.capabilities.vision
    assert client.models.retrieve(model_id=MODEL).id == MODEL
    with pytest.raises(SDKError, match="does not exist"):
        client.models.retrieve(model_id="other")


def test_moderation(client):
    answer = client.classifiers.moderate(model="mistral-moderation-latest", inputs=["import os"])
    (result,) = answer.results
    assert result.categories.keys() == result.category_scores.keys() >= {"fraud", "harassment"}


def test_files(client):
    line = {"custom_id": "0", "method": "POST", "url": "/v1/chat/completions"}
    content = json.dumps({**line, "body": {"model": MODEL, "messages": QUESTION, "max_tokens": 4}}).encode()
    file = client.files.upload(
        file={"file_name": "requests.jsonl", "content": content}, purpose="batch", visibility="user"
    )
    assert (file.size_bytes, file.sample_type, file.source) == (len(content), "batch_request", "upload")
    assert client.files.retrieve(file_id=file.id).filename == "requests.jsonl"
    assert file.id in [f.id for f in client.files.list().data]
    assert client.files.download(file_id=file.id).read() == content
    assert client.files.delete(file_id=file.id).deleted


def test_fill_in_the_middle(client):
    """The demo model's vocabulary may have the tokens for it or not; /v1/models says which."""
    options = {
        "model": MODEL,
        "prompt": "def add(a, b):\n",
        "suffix": "\n    return c",
        "max_tokens": 8,
        "random_seed": 5,
    }
    if not client.models.retrieve(model_id=MODEL).capabilities.completion_fim:
        with pytest.raises(SDKError, match="cannot fill in the middle"):
            client.fim.complete(**options)
        return
    answer = client.fim.complete(**options)
    assert answer.usage.completion_tokens <= 8
    chunks = [event.data for event in client.fim.stream(**options)]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == answer.choices[0].message.content


def test_agents_are_refused_by_name(client):
    with pytest.raises(SDKError, match="Use POST /v1/responses or /v1/chat/completions"):
        client.agents.complete(agent_id="ag:1", messages=QUESTION)
