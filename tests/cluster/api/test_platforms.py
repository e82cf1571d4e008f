"""The contracts of hosting platforms, by imitation: these requests are what their documentation says the platform sends."""

import contextlib
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer
from support.fakes.replica import FakeReplica, tokens
from support.paths import DEMO_MODEL

from cluster.api.app import make_app
from cluster.config.platform import recognize
from cluster.router.router import Router
from cluster.text.chat.mistral_template import MistralTemplate
from cluster.text.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer(DEMO_MODEL)
VERTEX = recognize(
    {
        "AIP_HTTP_PORT": "8080",
        "AIP_HEALTH_ROUTE": "/v1/endpoints/1/deployedModels/2",
        "AIP_PREDICT_ROUTE": "/v1/endpoints/1/deployedModels/2:predict",
    }
)
HUGGING_FACE = recognize({}, asked="huggingface")
SAGEMAKER = recognize({}, asked="sagemaker")
Connect = Callable[..., Any]


@pytest.fixture
async def connect() -> AsyncIterator[Connect]:
    async with contextlib.AsyncExitStack() as stack:

        async def start(*replicas: FakeReplica, **options: Any) -> TestClient:
            app = make_app(
                router=Router(list(replicas)),
                tokenizer=TOKENIZER,
                chat_template=MistralTemplate(TOKENIZER),
                model_name="demo",
                **options,
            )
            return await stack.enter_async_context(TestClient(TestServer(app)))

        yield start


def replica() -> FakeReplica:
    return FakeReplica(tokens(TOKENIZER.encode("Bonjour", bos=False), stop_token_id=2))


async def test_sagemaker_pings_and_invokes(connect: Connect) -> None:
    client = await connect(replica(), platform=SAGEMAKER, public_health=True)
    response = await client.get("/ping")
    assert (response.status, await response.json()) == (200, {"status": "ok"})
    # InvokeEndpoint sends the body and its type, and no header of the caller's.
    chat = await client.post("/invocations", json={"messages": [{"role": "user", "content": "Hi"}]})
    assert (await chat.json())["choices"][0]["message"]["content"] == "Bonjour"
    completion = await client.post("/invocations", json={"prompt": "Hi", "model": "demo"})
    assert (await completion.json())["object"] == "text_completion"


async def test_a_streamed_invocation_is_a_stream(connect: Connect) -> None:
    client = await connect(replica(), platform=SAGEMAKER)
    body = {"messages": [{"role": "user", "content": "Hi"}], "stream": True}
    response = await client.post("/invocations", json=body)
    assert response.headers["Content-Type"].startswith("text/event-stream")
    text = await response.text()
    chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    assert "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks if c["choices"]) == "Bonjour"
    assert text.rstrip().endswith("data: [DONE]")


async def test_vertex_has_instances_and_predictions(connect: Connect) -> None:
    assert VERTEX is not None and VERTEX.ready_path is not None
    client = await connect(replica(), platform=VERTEX, public_health=True)
    assert (await client.get(VERTEX.ready_path)).status == 200
    body = {
        "instances": [{"prompt": "Hi"}, {"messages": [{"role": "user", "content": "Hi"}]}, "Hi"],
        "parameters": {"max_tokens": 8, "temperature": 0},
    }
    response = await client.post(VERTEX.predict_path, json=body)
    answer = await response.json()
    assert response.status == 200, answer
    assert [p["object"] for p in answer["predictions"]] == ["text_completion", "chat.completion", "text_completion"]
    assert answer["predictions"][1]["choices"][0]["message"]["content"] == "Bonjour"
    # rawPredict sends the body as it is.
    raw = await client.post(VERTEX.predict_path, json={"prompt": "Hi", "max_tokens": 8})
    assert (await raw.json())["choices"][0]["text"] == " Bonjour"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"instances": []}, "'instances' must be a list that is not empty"),
        ({"instances": [7]}, "instances[0]: It must be an object or a text."),
        ({"instances": ["Hi", {"prompt": "Hi", "stream": True}]}, "instances[1]: It cannot be streamed."),
        ({"instances": [{"prompt": "Hi", "temperature": "hot"}]}, "instances[0]: Invalid value for 'temperature'"),
        ({"instances": [{"prompt": "Hi"}] * 129}, "The request has 129 instances; the limit is 128."),
        ({"text": "Hi"}, "The body has neither 'messages' nor 'prompt' nor 'input'."),
        ([1], "The request body must be a JSON object."),
    ],
)
async def test_what_cannot_be_answered_is_refused(connect: Connect, body: Any, message: str) -> None:
    client = await connect(replica())
    response = await client.post("/invocations", json=body)
    assert response.status == 400
    assert message in (await response.json())["error"]["message"]


async def test_readiness_without_a_key_says_ready_or_not_and_no_more(connect: Connect) -> None:
    options = {"api_key": "secret", "platform": HUGGING_FACE, "public_health": True}
    client = await connect(replica(), **options)
    for path in ("/health/ready", "/ping", "/health"):
        response = await client.get(path)
        answer = await response.json()
        assert response.status == 200
        assert {k: v for k, v in answer.items() if v} == {"status": "ok"}, "nothing about replicas"
        assert (await client.get(path, headers={"x-api-key": "wrong"})).status == 401
    detailed = await client.get("/health/ready", headers={"x-api-key": "secret"})
    assert (await detailed.json())["replicas"]
    for path in ("/metrics", "/v1/models", "/admin/cluster"):
        assert (await client.get(path)).status == 401
    assert (await client.post("/invocations", json={"prompt": "Hi"})).status == 401
    down = await connect(**options)
    response = await down.get("/ping")
    assert (response.status, await response.json()) == (503, {"status": "unavailable"})


async def test_without_the_option_readiness_needs_the_key(connect: Connect) -> None:
    client = await connect(replica(), api_key="secret")
    for path in ("/health/ready", "/ping", "/health"):
        assert (await client.get(path)).status == 401
    assert (await client.get("/ping", headers={"x-api-key": "secret"})).status == 200
