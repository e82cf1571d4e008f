"""The fields of /v1/moderations."""

import pytest
from support.clients.api_fields import Api, Row

PATHS = ("/v1/moderations",)
NUM_CATEGORIES = 13


async def classifies_each(api: Api, texts: list[str]) -> None:
    results = (await api.post({"input": texts}))["results"]
    assert len(results) == len(texts)
    for text, result in zip(texts, results, strict=True):
        assert len(result["category_scores"]) == len(result["categories"]) == NUM_CATEGORIES
        assert 0 < sum(result["category_scores"].values()) < 1
        assert result["flagged"] == any(result["categories"].values())
        (alone,) = (await api.post({"input": text}))["results"]
        assert alone["category_scores"] == pytest.approx(result["category_scores"], abs=1e-5)
    assert results[0]["category_scores"] != results[1]["category_scores"]


async def is_the_default(api: Api, model: str) -> None:
    named, unnamed = await api.post({"input": "a", "model": model}), await api.post({"input": "a"})
    assert named["model"] == unnamed["model"] == model
    scores = [answer["results"][0]["category_scores"] for answer in (named, unnamed)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)


async def must_be_served(api: Api, model: str) -> None:
    await api.refused({"input": "a", "model": model}, "model", "does not exist", status=404)


ROWS = [
    Row("ModerationRequest.input", ["a", "b"], classifies_each),
    Row("ModerationRequest.model", "demo", is_the_default),
    Row("ModerationRequest.model", "x", must_be_served),
]


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("row", ROWS, ids=str)
async def test_field(api: Api, row: Row) -> None:
    await row.prove(api, row.value)
