"""The field of /admin/replicas/{replica_id}/drain: how long the replica's running requests may stay."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
from support.clients.api_fields import Api, Row
from support.servers.live_replica import LiveReplica, live_gateway

PATHS = ("/admin/replicas/{replica_id}/drain",)


class RecordingAdmin:
    """Knows one replica, r0, and records how it was drained."""

    def __init__(self) -> None:
        self.drained: list[tuple[str, float | None]] = []

    async def drain_replica(self, replica_id: str, grace_s: float | None) -> None:
        self.drained.append((replica_id, grace_s))

    def cluster_view(self) -> object:
        return {}


ADMIN = RecordingAdmin()


@pytest.fixture
async def api(replica: LiveReplica) -> AsyncIterator[Api]:
    ADMIN.drained.clear()
    async with live_gateway(replica, admin=ADMIN) as client:
        yield Api(client, replica, "/admin/replicas/r0/drain")


async def reaches_the_admin(api: Api, grace_s: float | None) -> None:
    response = await api.client.post(api.path, json={"grace_s": grace_s})
    assert (response.status, await response.json()) == (202, {"id": "r0", "state": "draining"})
    assert ADMIN.drained == [("r0", grace_s)], "the admin must get the requested time"


async def is_refused_next_to_it(api: Api, name: str) -> None:
    await api.refused({"grace_s": 1, name: 1}, "grace_s", name)
    assert ADMIN.drained == [], "a misspelled field of an operator acts on no replica"


async def is_refused(api: Api, grace_s: Any) -> None:
    await api.refused({"grace_s": grace_s}, "grace_s", "grace_s")
    assert ADMIN.drained == []


ROWS = [
    Row("DrainRequest.grace_s", 12.5, reaches_the_admin),
    Row("DrainRequest.grace_s", 0, reaches_the_admin),
    Row("DrainRequest.grace_s", None, reaches_the_admin),
    Row("DrainRequest.grace_s", -1, is_refused),
    Row("DrainRequest.grace_s", "x", is_refused),
    Row("DrainRequest.grace_s", "grace", is_refused_next_to_it),
]


@pytest.mark.parametrize("row", ROWS, ids=str)
async def test_field(api: Api, row: Row) -> None:
    await row.prove(api, row.value)
