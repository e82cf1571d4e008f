"""/v1/score and /v1/rerank agree with /v1/embeddings and with the log-probabilities of completions. And /v1/fim/completions."""

from typing import Any

import numpy as np
import pytest
from aiohttp.test_utils import TestClient
from support.servers.live_replica import LiveReplica, live_gateway

TEXTS = ["import os", "def f(x):\n    return x", "import sys"]


@pytest.fixture(scope="module")
def live():
    replica = LiveReplica()
    yield replica
    replica.close()


async def post(client: TestClient, path: str, body: dict[str, Any], status: int = 200) -> dict[str, Any]:
    response = await client.post(path, json={"model": "demo", **body})
    assert response.status == status, await response.text()
    return await response.json()


async def test_similarity_is_the_cosine_of_the_embeddings(live: LiveReplica) -> None:
    async with live_gateway(live) as client:
        items = (await post(client, "/v1/embeddings", {"input": TEXTS}))["data"]
        vectors = [np.array(item["embedding"]) / np.linalg.norm(item["embedding"]) for item in items]
        scores = await post(client, "/v1/score", {"text_1": TEXTS[0], "text_2": TEXTS})
        found = [item["score"] for item in scores["data"]]
        assert found == pytest.approx([vectors[0] @ vector for vector in vectors], abs=1e-6)
        pairs = await post(client, "/v1/score", {"text_1": TEXTS, "text_2": TEXTS})
        assert [item["score"] for item in pairs["data"]] == pytest.approx([1.0] * 3)
        ranked = await post(client, "/v1/rerank", {"query": TEXTS[0], "documents": [*TEXTS[1:], {"text": TEXTS[0]}]})
        results = ranked["results"]
        assert results[0]["index"] == 2 and results[0]["document"] == {"text": TEXTS[0]}
        assert [r["relevance_score"] for r in results] == sorted(found, reverse=True)
        top = await post(
            client, "/v1/rerank", {"query": "a", "documents": TEXTS, "top_n": 2, "return_documents": False}
        )
        assert [r["document"] for r in top["results"]] == [None, None]
        error = await post(client, "/v1/score", {"text_1": TEXTS, "text_2": TEXTS[:2]}, 400)
        assert error["error"]["param"] == "text_2"


async def test_logprob_is_that_of_the_continuation(live: LiveReplica) -> None:
    async with live_gateway(live) as client:
        scores = await post(client, "/v1/score", {"text_1": "import", "text_2": [" os", " sys"], "scoring": "logprob"})
        for item, text in zip(scores["data"], (" os", " sys"), strict=True):
            echoed = await post(
                client, "/v1/completions", {"prompt": "import" + text, "echo": True, "logprobs": 0, "max_tokens": 0}
            )
            logprobs = echoed["choices"][0]["logprobs"]
            own = [
                logprob
                for offset, logprob in zip(logprobs["text_offset"], logprobs["token_logprobs"], strict=True)
                if offset >= len("import")
            ]
            assert item["score"] == pytest.approx(sum(own), abs=1e-4)


async def test_filling_in_the_middle(live: LiveReplica) -> None:
    body = {"prompt": "def f(", "suffix": "return x", "max_tokens": 5, "random_seed": 1}
    async with live_gateway(live) as client:
        card = await (await client.get("/v1/models/demo")).json()
        able = card["capabilities"]["completion_fim"]
        answer = await post(client, "/v1/fim/completions", body, 200 if able else 400)
        if not able:
            assert answer["error"]["code"] == "infilling_unsupported"
            return
        completion = await post(client, "/v1/completions", body)
        assert answer["choices"][0]["message"]["content"] == completion["choices"][0]["text"]
        assert answer["object"] == "chat.completion"
