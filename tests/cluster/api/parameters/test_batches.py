"""The fields of /v1/files and /v1/batches. endpoints/batches/test_files.py and test_batches.py have what they refuse."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp.test_utils import TestClient
from support.batch.app import batch_app
from support.clients.api_fields import Api, Row
from support.servers.live_replica import TOKEN, LiveReplica

from cluster.replicas.client import ReplicaClient

PATHS = ("/v1/files", "/v1/batches")
LINE = {"custom_id": "a", "method": "POST", "url": "/v1/embeddings", "body": {"model": "demo", "input": "one"}}
CONTENT = json.dumps(LINE).encode()
CREATED_AT = {"anchor": "created_at", "seconds": 3600}


@pytest.fixture
async def api(replica: LiveReplica, tmp_path: Path) -> AsyncIterator[Api]:
    async with (
        ReplicaClient("r0", replica.address, TOKEN) as client,
        batch_app(tmp_path, [client]) as http,
    ):
        yield Api(http, replica, "/v1/batches")


async def upload(client: TestClient, *, content: bytes = CONTENT, **fields: Any) -> dict[str, Any]:
    form = aiohttp.FormData()
    for name, value in ({"purpose": "batch"} | fields).items():
        form.add_field(name, value)
    form.add_field("file", content, filename="in.jsonl")
    response = await client.post("/v1/files", data=form)
    assert response.status == 200, await response.text()
    return await response.json()


async def create(api: Api, **fields: Any) -> dict[str, Any]:
    file = await upload(api.client)
    body = {"input_file_id": file["id"], "endpoint": "/v1/embeddings", "completion_window": "24h"}
    return await api.post(body | fields)


async def finish(api: Api, batch: dict[str, Any]) -> dict[str, Any]:
    async with asyncio.timeout(20):
        while batch["status"] not in ("completed", "failed"):
            await asyncio.sleep(0.02)
            batch = await (await api.client.get(f"/v1/batches/{batch['id']}")).json()
    return batch


async def is_stored(api: Api, content: bytes) -> None:
    file = await upload(api.client, content=content)
    assert await (await api.client.get(f"/v1/files/{file['id']}/content")).read() == content


async def is_shown(api: Api, purpose: str) -> None:
    assert (await upload(api.client, purpose=purpose))["purpose"] == purpose


async def sets_the_expiry_of_the_file(api: Api, expires_after: dict[str, Any]) -> None:
    as_fields = {f"expires_after[{name}]": str(value) for name, value in expires_after.items()}
    for fields in ({"expires_after": json.dumps(expires_after)}, as_fields):
        file = await upload(api.client, **fields)
        assert file["expires_at"] - file["created_at"] == expires_after["seconds"]


async def is_answered(api: Api, content: bytes) -> None:
    file = await upload(api.client, content=content)
    batch = await finish(api, await create(api, input_file_id=file["id"]))
    assert (batch["status"], batch["input_file_id"]) == ("completed", file["id"])
    assert batch["request_counts"] == {"total": 1, "completed": 1, "failed": 0}
    output = await (await api.client.get(f"/v1/files/{batch['output_file_id']}/content")).text()
    assert json.loads(output)["response"]["body"]["object"] == "list"


async def must_match_the_lines(api: Api, endpoint: str) -> None:
    assert (await finish(api, await create(api, endpoint=endpoint)))["status"] == "failed"
    assert (await finish(api, await create(api)))["endpoint"] == LINE["url"]


async def sets_the_expiry_of_the_batch(api: Api, window: str) -> None:
    batch = await create(api, completion_window=window)
    assert batch["expires_at"] - batch["created_at"] == 7200


async def is_kept(api: Api, metadata: dict[str, str]) -> None:
    batch = await finish(api, await create(api, metadata=metadata))
    assert batch["metadata"] == metadata


async def sets_the_expiry_of_the_output(api: Api, expires_after: dict[str, Any]) -> None:
    batch = await finish(api, await create(api, output_expires_after=expires_after))
    output = await (await api.client.get(f"/v1/files/{batch['output_file_id']}")).json()
    assert output["expires_at"] - output["created_at"] == expires_after["seconds"]


ROWS = [
    Row("FileUpload.file", CONTENT, is_stored),
    Row("FileUpload.purpose", "batch", is_shown),
    Row("FileUpload.expires_after", CREATED_AT, sets_the_expiry_of_the_file),
    Row("ExpiresAfter.anchor", CREATED_AT, sets_the_expiry_of_the_output),
    Row("ExpiresAfter.seconds", CREATED_AT | {"seconds": 7200}, sets_the_expiry_of_the_file),
    Row("BatchRequest.input_file_id", CONTENT, is_answered),
    Row("BatchRequest.endpoint", "/v1/completions", must_match_the_lines),
    Row("BatchRequest.completion_window", "2h", sets_the_expiry_of_the_batch),
    Row("BatchRequest.metadata", {"k": "v"}, is_kept),
    Row("BatchRequest.output_expires_after", CREATED_AT | {"seconds": 7200}, sets_the_expiry_of_the_output),
]


@pytest.mark.parametrize("row", ROWS, ids=str)
async def test_field(api: Api, row: Row) -> None:
    await row.prove(api, row.value)
