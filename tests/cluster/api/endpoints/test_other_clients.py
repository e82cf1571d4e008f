"""What clients of other servers ask for: Azure's paths, Mistral's model card, a remote tokenizer, endpoints that exist elsewhere."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp.test_utils import TestClient, TestServer
from support.fakes.replica import FakeReplica, tokens
from support.paths import DEMO_MODEL

from cluster.api.app import make_app
from cluster.api.endpoints.table import ENDPOINTS
from cluster.api.server.errors import INSTEAD
from cluster.router.router import Router
from cluster.text.chat.jinja_template import JinjaTemplate
from cluster.text.chat.mistral_template import MistralTemplate
from cluster.text.chat.template_files import TemplateFiles
from cluster.text.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer(DEMO_MODEL)
TEMPLATE = MistralTemplate(TOKENIZER)
NAMES = ("demo", "org/alias")
CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}


async def serve(**options: Any) -> TestClient:
    arguments = {"tokenizer": TOKENIZER, "chat_template": TEMPLATE, "model_name": NAMES} | options
    return TestClient(TestServer(make_app(router=Router([FakeReplica(tokens([42, 43]))]), **arguments)))


@pytest.fixture
async def client() -> AsyncIterator[TestClient]:
    async with await serve() as client:
        yield client


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("chat/completions", CHAT),
        ("completions", {"prompt": "x", "max_tokens": 2}),
        ("chat/completions", CHAT | {"model": "gpt-4o"}),
        ("completions", {"prompt": "x" * 70_000, "max_tokens": 2, "truncate_prompt_tokens": 5, "model": 7}),
    ],
)
@pytest.mark.parametrize("deployment", NAMES)
async def test_azures_deployment_is_the_model(
    client: TestClient, path: str, body: dict[str, Any], deployment: str
) -> None:
    response = await client.post(f"/openai/deployments/{deployment}/{path}?api-version=2024-10-21", json=body)
    assert response.status == 200, await response.text()
    assert (await response.json())["model"] == deployment


async def test_azures_other_paths(client: TestClient) -> None:
    response = await client.post("/openai/deployments/other/chat/completions", json=CHAT | {"model": "demo"})
    assert (response.status, (await response.json())["error"]["code"]) == (404, "model_not_found")
    for path in ("/models", "/models/demo", "/models/org/alias"):
        ours, azures = await client.get(f"/v1{path}"), await client.get(f"/openai{path}?api-version=1")
        assert ours.status == azures.status == 200
        assert await ours.json() == await azures.json()
    embeddings = [e for e in ENDPOINTS if e.path.startswith("/openai/") and e.path.endswith("/embeddings")]
    assert [(e.method, e.query) for e in embeddings] == [("POST", ("api-version",))]


async def test_a_model_card_says_what_the_model_can_be_used_for() -> None:
    async with await serve() as client:
        card = await (await client.get("/v1/models/org/alias")).json()
        assert card["max_context_length"] == card["max_model_len"]
        assert (card["type"], card["aliases"]) == ("base", ["demo"])
        assert {name for name, can in card["capabilities"].items() if can} == {
            "completion_chat",
            "function_calling",
            "moderation",
        }
    async with await serve(chat_template=None) as client:
        card = await (await client.get("/v1/models/demo")).json()
        assert not any(card["capabilities"].values())


async def test_tokenizer_info(tmp_path: Path) -> None:
    async with await serve() as client:
        info = await (await client.get("/tokenizer_info")).json()
        assert (info["bos_token"], info["eos_token"], info["pad_token"]) == ("<s>", "</s>", None)
        assert info["vocab_size"] == TOKENIZER.vocab_size
        assert info["chat_template"] is None, "mistral-common's templates are not in Jinja"
    source = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    template = JinjaTemplate(TOKENIZER, TemplateFiles({"default": source}), model_vocab_size=TOKENIZER.vocab_size)
    async with await serve(chat_template=template) as client:
        assert (await (await client.get("/tokenizer_info")).json())["chat_template"] == source


@pytest.mark.parametrize(
    ("path", "instead"),
    [
        ("/v1/agents", "/v1/responses or /v1/chat/completions"),
        ("/v1/agents/completions/", "/v1/responses or /v1/chat/completions"),
        ("/v1/conversations", "'previous_response_id'"),
        ("/v2/rerank", "/v1/rerank"),
        ("/v1/batch/jobs", "/v1/batches"),
        ("/api/chat", "/v1/chat/completions"),
        ("/chat/completions", "the base URL ends with /v1"),
        ("/v1/v1/completions", "the base URL ends with one /v1"),
        ("/v1/nothing", "/openapi.json"),
        ("/v1/audio/speech", "text only"),
    ],
)
async def test_an_unknown_path_says_what_to_use(client: TestClient, path: str, instead: str) -> None:
    for method in ("POST", "GET"):
        response = await client.request(method, path, json={} if method == "POST" else None)
        error = (await response.json())["error"]
        assert (response.status, error["code"]) == (404, "unknown_url")
        assert instead in error["message"]


async def test_what_openais_client_has_besides_is_refused_by_name(client: TestClient) -> None:
    response = await client.post("/v1/responses/compact", json={"model": "demo", "input": "x"})
    error = (await response.json())["error"]
    assert (response.status, error["code"]) == (404, "unknown_url") and "'truncation': 'auto'" in error["message"]
    with pytest.raises(aiohttp.WSServerHandshakeError, match="400"):
        await client.ws_connect("/v1/responses")
    response = await client.get("/v1/responses", headers={"Upgrade": "websocket", "Connection": "Upgrade"})
    assert "does not speak WebSocket" in (await response.json())["error"]["message"]
    assert (await client.get("/v1/responses")).status == 405


def test_every_endpoint_that_is_recommended_exists() -> None:
    paths = {f"{e.method} {e.path}" for e in ENDPOINTS}
    for path, instead in INSTEAD.items():
        assert " ".join(instead.replace(":", " ").split()[:2]) in paths, instead
        assert not any(path == e.path for e in ENDPOINTS), f"{path} exists"
