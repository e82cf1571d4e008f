"""OpenAI's client for Azure: the deployment in the path, `api-version` in the query, the key in the header `api-key`."""

import openai
import pytest
from openai import AsyncAzureOpenAI, AzureOpenAI

MODEL = "demo_model"
QUESTION = [{"role": "user", "content": "What does os.path.join do?"}]


@pytest.fixture
def endpoint(url):
    return {"azure_endpoint": url.removesuffix("/v1"), "api_version": "2024-10-21", "max_retries": 0, "timeout": 60}


@pytest.fixture
def client(endpoint, key):
    return AzureOpenAI(**endpoint, api_key=key)


def test_chat_and_stream(client):
    options = {"model": MODEL, "messages": QUESTION, "max_tokens": 12, "seed": 3}
    answer = client.chat.completions.create(**options)
    assert answer.model == MODEL and answer.usage.completion_tokens <= 12
    chunks = list(client.chat.completions.create(**options, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == answer.choices[0].message.content


async def test_async(endpoint, key):
    async with AsyncAzureOpenAI(**endpoint, api_key=key) as client:
        answer = await client.chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=4)
        assert answer.choices[0].finish_reason


def test_the_deployment_decides(endpoint, key):
    client = AzureOpenAI(**endpoint, azure_deployment=MODEL, api_key=key)
    answer = client.chat.completions.create(model="gpt-4o", messages=QUESTION, max_tokens=4)
    assert answer.model == MODEL
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        AzureOpenAI(**endpoint, azure_deployment="other", api_key=key).chat.completions.create(
            model=MODEL, messages=QUESTION, max_tokens=4
        )


def test_completions_embeddings_and_models(client):
    assert client.completions.create(model=MODEL, prompt="import ", max_tokens=4).choices[0].text
    (item,) = client.embeddings.create(model=MODEL, input="x = 1", dimensions=64).data
    assert len(item.embedding) == 64
    assert [model.id for model in client.models.list()] == [MODEL]


def test_keys(endpoint, key):
    with pytest.raises(openai.AuthenticationError):
        AzureOpenAI(**endpoint, api_key="no").completions.create(model=MODEL, prompt="x", max_tokens=1)
    by_token = AzureOpenAI(**endpoint, azure_ad_token=key)
    assert by_token.completions.create(model=MODEL, prompt="x", max_tokens=1).choices
