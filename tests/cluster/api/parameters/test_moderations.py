"""The fields of /v1/moderations."""

import openai
import pytest
from support.clients.api_fields import Api, Row

from cluster.api.schemas.moderations import OPENAI_CATEGORIES
from cluster.text.chat.moderation import CATEGORIES

PATHS = ("/v1/moderations",)
MODERATION_MODELS = [
    "omni-moderation-latest",
    "omni-moderation-2024-09-26",
    "text-moderation-latest",
    "text-moderation-stable",
    "text-moderation-007",
    "mistral-moderation-latest",
    "mistral-moderation-2411",
]


async def classifies_each(api: Api, texts: list[str]) -> None:
    results = (await api.post({"input": texts}))["results"]
    assert len(results) == len(texts)
    for text, result in zip(texts, results, strict=True):
        scores = result["category_scores"]
        assert scores.keys() == result["categories"].keys() == {*CATEGORIES, *OPENAI_CATEGORIES}
        assert 0 < sum(scores[name] for name in CATEGORIES) < 1
        for name, included in OPENAI_CATEGORIES.items():
            assert scores[name] == pytest.approx(sum(scores[c] for c in included))
            assert result["categories"][name] == any(result["categories"][c] for c in included)
        assert result["flagged"] == any(result["categories"].values())
        typed = openai.types.Moderation.model_validate(result, strict=True)
        assert typed.categories.self_harm == result["categories"]["self-harm"]
        assert typed.category_scores.sexual_minors == scores["child abuse"]
        assert typed.category_applied_input_types.violence_graphic == ["text"]
        (alone,) = (await api.post({"input": text}))["results"]
        assert alone["category_scores"] == pytest.approx(result["category_scores"], abs=1e-5)
    assert results[0]["category_scores"] != results[1]["category_scores"]


async def joins_the_parts_of_one_text(api: Api, texts: list[str]) -> None:
    parts = [{"type": "text", "text": text} for text in texts]
    (result,) = (await api.post({"input": parts}))["results"]
    (joined,) = (await api.post({"input": "\n\n".join(texts)}))["results"]
    assert result["category_scores"] == pytest.approx(joined["category_scores"], abs=1e-5)
    await api.refused({"input": [*texts, *parts]}, "input", "mixes")
    image = {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}
    await api.refused({"input": [*parts, image]}, "input", "")


async def is_the_served_model(api: Api, names: list[str]) -> None:
    expected = (await api.post({"input": "a"}))["results"][0]["category_scores"]
    for name in names:
        answer = await api.post({"input": "a", "model": name})
        assert answer["model"] == "demo", "the response names the model that judged"
        assert answer["results"][0]["category_scores"] == pytest.approx(expected, abs=1e-5)


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
    Row("ModerationRequest.model", "omni-moderation-", must_be_served),
    Row("ModerationRequest.model", MODERATION_MODELS, is_the_served_model),
    Row("TextInput.text, TextInput.type", ["a", "b"], joins_the_parts_of_one_text),
]


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("row", ROWS, ids=str)
async def test_field(api: Api, row: Row) -> None:
    await row.prove(api, row.value)
