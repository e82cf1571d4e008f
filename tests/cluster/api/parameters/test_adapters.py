"""The fields of /v1/load_lora_adapter and /v1/unload_lora_adapter: what each tells the deployment."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
from support.clients.api_fields import Api, Row
from support.servers.live_replica import LiveReplica, live_gateway

from cluster.protocol.adapters import AdapterRevision, Registry

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
PATHS = (LOAD, UNLOAD)
BODY = {"lora_name": "support", "lora_path": "/a"}


class RecordingAdmin:
    """Records what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []

    async def load_adapter(
        self, name: str, source: str, *, share: float | None, in_place: bool, base_model: str | None
    ) -> AdapterRevision:
        self.asked.append((name, source, share, in_place, base_model))
        return AdapterRevision(id=f"{name}@d", name=name, source=source, digest="d", rank=8, num_bytes=1)

    async def change_adapter(self, change: str, name: str) -> Registry:
        self.asked.append((change, name))
        return Registry()


ADMIN = RecordingAdmin()


@pytest.fixture
async def api(replica: LiveReplica, path: str) -> AsyncIterator[Api]:
    ADMIN.asked.clear()
    async with live_gateway(replica, admin=ADMIN) as client:
        yield Api(client, replica, path)


async def is_named(api: Api, name: str) -> None:
    response = await api.client.post(api.path, json=BODY | {"lora_name": name})
    assert response.status == 200 and name in await response.text()
    assert ADMIN.asked == [(name, "/a", None, False, None) if api.path == LOAD else ("unload", name)]


async def is_the_source(api: Api, source: str) -> None:
    await api.client.post(api.path, json=BODY | {"lora_path": source})
    assert ADMIN.asked == [("support", source, None, False, None)]


async def replaces(api: Api, in_place: bool) -> None:
    await api.client.post(api.path, json=BODY | {"load_inplace": in_place})
    assert ADMIN.asked == [("support", "/a", None, in_place, None)]


async def is_a_tenth(api: Api, canary: Any) -> None:
    await api.client.post(api.path, json=BODY | {"canary": canary})
    assert ADMIN.asked == [("support", "/a", 0.1, False, None)]


async def is_no_canary(api: Api, canary: None) -> None:
    await api.client.post(api.path, json=BODY | {"canary": canary})
    assert ADMIN.asked == [("support", "/a", None, False, None)]


async def is_the_parent(api: Api, base: str) -> None:
    await api.client.post(api.path, json=BODY | {"base_model_name": base})
    assert ADMIN.asked == [("support", "/a", None, False, base)]


async def is_no_parent(api: Api, base: str) -> None:
    response = await api.client.post(api.path, json=BODY | {"base_model_name": base})
    assert response.status == 404 and "does not exist" in await response.text()
    assert ADMIN.asked == []


async def is_refused(api: Api, canary: Any) -> None:
    await api.refused(BODY | {"canary": canary}, "canary", "canary")
    assert ADMIN.asked == []


LOAD_ROWS = [
    Row("LoadAdapterRequest.lora_name", "team/support-v2", is_named),
    Row("LoadAdapterRequest.lora_path", "owner/name", is_the_source),
    Row("LoadAdapterRequest.load_inplace", True, replaces),
    Row("LoadAdapterRequest.load_inplace", False, replaces),
    Row("LoadAdapterRequest.canary", "10%", is_a_tenth),
    Row("LoadAdapterRequest.canary", 0.1, is_a_tenth),
    Row("LoadAdapterRequest.canary", None, is_no_canary),
    Row("LoadAdapterRequest.canary", 1.5, is_refused),
    Row("LoadAdapterRequest.canary", "half", is_refused),
    Row("LoadAdapterRequest.base_model_name", "demo", is_the_parent),
    Row("LoadAdapterRequest.base_model_name", "other", is_no_parent),
]
UNLOAD_ROWS = [Row("UnloadAdapterRequest.lora_name", "support", is_named)]
ROWS = [*LOAD_ROWS, *UNLOAD_ROWS]


@pytest.mark.parametrize("path", [LOAD])
@pytest.mark.parametrize("row", LOAD_ROWS, ids=str)
async def test_field_of_a_load(api: Api, row: Row) -> None:
    await row.prove(api, row.value)


@pytest.mark.parametrize("path", [UNLOAD])
@pytest.mark.parametrize("row", UNLOAD_ROWS, ids=str)
async def test_field_of_an_unload(api: Api, row: Row) -> None:
    await row.prove(api, row.value)
