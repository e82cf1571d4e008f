"""The fields of /detokenize."""

import pytest
from support.clients.api_fields import PROMPT, Api, Row, refused
from support.servers.live_replica import TOKENIZER

PATHS = ("/detokenize",)
IDS = TOKENIZER.encode(PROMPT)


async def is_decoded(api: Api, token_ids: list[int]) -> None:
    assert await api.post({"tokens": token_ids}) == {"prompt": PROMPT}


async def is_accepted(api: Api, model: str) -> None:
    assert await api.post({"tokens": IDS, "model": model}) == {"prompt": PROMPT}


ROWS = [
    Row("DetokenizeRequest.tokens", IDS, is_decoded),
    Row("DetokenizeRequest.tokens", {"tokens": [4096]}, refused("4096")),
    Row("DetokenizeRequest.model", "demo", is_accepted),
    Row("DetokenizeRequest.model", {"model": "x"}, refused("does not exist", status=404, tokens=[5])),
]


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("row", ROWS, ids=str)
async def test_field(api: Api, row: Row) -> None:
    await row.prove(api, row.value)
