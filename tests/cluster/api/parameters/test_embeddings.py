"""The fields of /v1/embeddings."""

import base64
import math
import struct
from typing import Any

import pytest
from support.clients.api_fields import PROMPT, Api, Row
from support.servers.live_replica import TOKENIZER

PATHS = ("/v1/embeddings",)
ONE, TWO = "one", "two"


async def embed(api: Api, **fields: Any) -> dict[str, Any]:
    return await api.post({"model": "demo", "input": ONE} | fields)


async def vector_of(api: Api, **fields: Any) -> list[float]:
    return (await embed(api, **fields))["data"][0]["embedding"]


async def must_be_served(api: Api, model: str) -> None:
    await api.refused({"input": ONE, "model": model}, "model", "does not exist", status=404)


async def embeds_each(api: Api, inputs: list[Any]) -> None:
    answer = await embed(api, input=inputs)
    assert answer["id"].startswith("embd-")
    vectors = [item["embedding"] for item in answer["data"]]
    assert vectors[0] != vectors[1]
    for text, vector in zip(inputs, vectors, strict=True):
        assert await vector_of(api, input=text) == pytest.approx(vector, abs=1e-5)
    assert answer["usage"]["prompt_tokens"] == sum(len(TOKENIZER.encode(text)) for text in inputs)
    await api.refused({"model": "demo", "input": []}, "input", "empty")


async def embeds_token_ids(api: Api, token_ids: list[int]) -> None:
    assert await vector_of(api, input=token_ids) == pytest.approx(await vector_of(api), abs=1e-5)


async def encodes_the_same_floats(api: Api, encoding: str) -> None:
    expected = await vector_of(api)
    data = base64.b64decode((await embed(api, encoding_format=encoding))["data"][0]["embedding"])
    assert list(struct.unpack(f"<{len(expected)}f", data)) == pytest.approx(expected, abs=1e-5)


async def lists_floats(api: Api, encoding: str) -> None:
    assert await vector_of(api, encoding_format=encoding) == pytest.approx(await vector_of(api), abs=1e-5)


async def keeps_the_first(api: Api, num_dimensions: int) -> None:
    whole, size = await vector_of(api), api.replica.core.config.model.hidden_size
    length = math.hypot(*whole[:num_dimensions])
    expected = [x / length for x in whole[:num_dimensions]]
    for name in ("dimensions", "output_dimension"):
        assert await vector_of(api, **{name: num_dimensions}) == pytest.approx(expected, abs=1e-5)
        assert await vector_of(api, **{name: size}) == pytest.approx(whole, abs=1e-5)
        await api.refused({"model": "demo", "input": ONE, name: size + 1}, name, f"at most {size}")
        await api.refused({"model": "demo", "input": ONE, name: 0}, name, ">= 1")
    both = {"model": "demo", "input": ONE, "dimensions": num_dimensions, "output_dimension": 1}
    await api.refused(both, "output_dimension", "Send one of them")
    answer = await embed(api, dimensions=num_dimensions, encoding_format="base64")
    data = base64.b64decode(answer["data"][0]["embedding"])
    assert list(struct.unpack(f"<{num_dimensions}f", data)) == pytest.approx(expected, abs=1e-5)


async def is_the_only_type(api: Api, dtype: str) -> None:
    assert await vector_of(api, output_dtype=dtype) == pytest.approx(await vector_of(api), abs=1e-5)
    await api.refused({"model": "demo", "input": ONE, "output_dtype": "int8"}, "output_dtype", "int8")


async def changes_nothing(api: Api, user: str) -> None:
    assert await vector_of(api, user=user) == pytest.approx(await vector_of(api), abs=1e-5)
    await api.refused({"model": "demo", "input": ONE, "user": 5}, "user", "str")


async def reaches_the_engine(api: Api, priority: int) -> None:
    seen = []
    add = api.replica.core.add_request
    api.replica.core.add_request = lambda request: (seen.append(request.priority), add(request))[1]  # type: ignore[method-assign]
    try:
        await embed(api, priority=priority)
        await embed(api)
    finally:
        del api.replica.core.add_request
    assert seen == [priority, 0]


async def shortens_the_input(api: Api, keep: int) -> None:
    assert (await embed(api, input=PROMPT, truncate_prompt_tokens=keep))["usage"]["prompt_tokens"] == keep


ROWS = [
    Row("EmbeddingRequest.model", "x", must_be_served),
    Row("EmbeddingRequest.input", [ONE, TWO], embeds_each),
    Row("EmbeddingRequest.input", TOKENIZER.encode(ONE), embeds_token_ids),
    Row("EmbeddingRequest.encoding_format", "base64", encodes_the_same_floats),
    Row("EmbeddingRequest.encoding_format", "float", lists_floats),
    Row("EmbeddingRequest.dimensions, EmbeddingRequest.output_dimension", 10, keeps_the_first),
    Row("EmbeddingRequest.output_dtype", "float", is_the_only_type),
    Row("EmbeddingRequest.user", "u", changes_nothing),
    Row("EmbeddingRequest.priority", 1, reaches_the_engine),
    Row("EmbeddingRequest.truncate_prompt_tokens", 3, shortens_the_input),
]


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("row", ROWS, ids=str)
async def test_field(api: Api, row: Row) -> None:
    await row.prove(api, row.value)
