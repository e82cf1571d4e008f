"""The fields of /v1/score, /v1/rerank and /v1/fim/completions. What a score is: tests/cluster/api/endpoints/test_scores.py."""

from typing import Any

import pytest
from support.clients.api_fields import Api, Row

SCORE, RERANK, FIM = PATHS = ("/v1/score", "/v1/rerank", "/v1/fim/completions")
TEXTS = ["import os", "class A:", "import sys"]
SCORED = {"model": "demo", "text_1": TEXTS[0], "text_2": TEXTS}
RANKED = {"model": "demo", "query": TEXTS[0], "documents": TEXTS}
FILLED = {"model": "demo", "prompt": "def f(", "suffix": "return x", "max_tokens": 8, "temperature": 0}


async def scores(api: Api, **fields: Any) -> list[float]:
    return [item["score"] for item in (await api.post(SCORED | fields, path=SCORE))["data"]]


async def ranks(api: Api, **fields: Any) -> list[dict[str, Any]]:
    return (await api.post(RANKED | fields, path=RERANK))["results"]


async def pairs_are_scored(api: Api, texts: list[str]) -> None:
    one = await scores(api, text_2=texts)
    assert one == pytest.approx(await scores(api, text_1=[TEXTS[0]] * len(texts), text_2=texts))
    assert one == pytest.approx([(await scores(api, text_2=text))[0] for text in texts])


async def decides_the_score(api: Api, scoring: str) -> None:
    found = await scores(api, scoring=scoring)
    assert (max(found) <= 0) == (scoring == "logprob")
    best = (await ranks(api, scoring=scoring))[0]
    assert best["relevance_score"] == pytest.approx(max(found), abs=1e-4)


async def shortens_the_texts(api: Api, keep: int) -> None:
    assert await scores(api, truncate_prompt_tokens=keep) != await scores(api)
    assert await scores(api, truncate_prompt_tokens=-1) == pytest.approx(await scores(api))
    assert {r["index"]: r["relevance_score"] for r in await ranks(api, truncate_prompt_tokens=keep)} == pytest.approx(
        dict(enumerate(await scores(api, truncate_prompt_tokens=keep)))
    )


async def orders_the_documents(api: Api, documents: list[Any]) -> None:
    results = await ranks(api, documents=documents)
    assert [r["relevance_score"] for r in results] == sorted((r["relevance_score"] for r in results), reverse=True)
    assert results[0]["document"] == {"text": TEXTS[0]}, "the query itself is the most similar"


async def limits_the_results(api: Api, top_n: int) -> None:
    assert await ranks(api, top_n=top_n) == (await ranks(api))[: top_n or None]


async def hides_the_documents(api: Api, return_documents: bool) -> None:
    assert [r["document"] for r in await ranks(api, return_documents=return_documents)] == [None] * len(TEXTS)


async def changes_no_score(api: Api, fields: dict[str, Any]) -> None:
    assert await scores(api, **fields) == pytest.approx(await scores(api))
    assert await ranks(api, **fields) == await ranks(api)


async def must_be_served(api: Api, model: str) -> None:
    for path, body in ((SCORE, SCORED), (RERANK, RANKED), (FIM, FILLED)):
        response = await api.client.post(path, json=body | {"model": model})
        assert (response.status, (await response.json())["error"]["param"]) == (404, "model")


async def acts_as_in_completions(api: Api, fields: dict[str, Any]) -> None:
    """Where the vocabulary has the tokens; the demo model's decides."""
    response = await api.client.post(FIM, json=FILLED | fields)
    answer = await response.json()
    card = await (await api.client.get("/v1/models/demo")).json()
    if not card["capabilities"]["completion_fim"]:
        assert (response.status, answer["error"]["code"]) == (400, "infilling_unsupported")
        return
    if fields.get("stream"):
        return
    completion = await api.post(FILLED | fields, path="/v1/completions")
    assert answer["choices"][0]["message"]["content"] == completion["choices"][0]["text"]


async def is_checked(api: Api, fields: dict[str, Any]) -> None:
    response = await api.client.post(FIM, json=FILLED | fields)
    error = (await response.json())["error"]
    assert (response.status, error["param"]) == (400, next(iter(fields))), error


ROWS = [
    Row("ScoreRequest.model, RerankRequest.model, SampledRequest.model", "x", must_be_served),
    Row("ScoreRequest.text_1, ScoreRequest.text_2", TEXTS, pairs_are_scored),
    Row("ScoreRequest.scoring, RerankRequest.scoring", "similarity", decides_the_score),
    Row("ScoreRequest.scoring, RerankRequest.scoring", "logprob", decides_the_score),
    Row("ScoreRequest.truncate_prompt_tokens, RerankRequest.truncate_prompt_tokens", 2, shortens_the_texts),
    Row("ScoreRequest.priority, RerankRequest.priority", {"priority": 5}, changes_no_score),
    Row("ScoreRequest.user, RerankRequest.user", {"user": "u"}, changes_no_score),
    Row("RerankRequest.query, RerankRequest.documents", TEXTS, orders_the_documents),
    Row("RerankRequest.documents, RerankDocument.text", [{"text": text} for text in TEXTS], orders_the_documents),
    Row("RerankRequest.top_n", 2, limits_the_results),
    Row("RerankRequest.top_n", 0, limits_the_results),
    Row("RerankRequest.return_documents", False, hides_the_documents),
    Row("FimRequest.prompt, FimRequest.suffix, SampledRequest.max_tokens", {"suffix": "x"}, acts_as_in_completions),
    Row("SampledRequest.stream, SampledRequest.stream_options", {"stream": True, "stream_options": {"include_usage": True}},
        acts_as_in_completions),
    Row("SampledRequest.temperature, SampledRequest.top_p, SampledRequest.seed", {"temperature": 1, "top_p": 0.9, "seed": 1},
        acts_as_in_completions),
    Row("SampledRequest.random_seed", {"temperature": 1, "random_seed": 1}, acts_as_in_completions),
    Row("SampledRequest.random_seed", {"random_seed": 1, "seed": 2}, is_checked),
    Row("SampledRequest.stop, SampledRequest.min_tokens", {"stop": "e", "min_tokens": 2}, acts_as_in_completions),
    Row("SampledRequest.ignore_eos, SampledRequest.priority, SampledRequest.user", {"ignore_eos": True, "priority": 1, "user": "u"},
        acts_as_in_completions),
    Row("SampledRequest.stop", {"stop": ["x", ""]}, is_checked),
]  # fmt: skip


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("path", PATHS[:1])
@pytest.mark.parametrize("row", ROWS, ids=str)
async def test_field(api: Api, row: Row) -> None:
    await row.prove(api, row.value)
