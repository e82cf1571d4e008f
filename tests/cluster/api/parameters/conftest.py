"""A real engine, socket, router and application over the demo model, one of each for each file of this folder."""

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio
from aiohttp.test_utils import TestClient
from support.clients.api_fields import Api, Output
from support.servers.live_replica import LiveReplica, live_gateway


@pytest.fixture(scope="module")
def replica() -> Iterator[LiveReplica]:
    replica = LiveReplica(max_model_len=1024, max_num_batched_tokens=256, num_kv_blocks=1024)
    yield replica
    replica.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(replica: LiveReplica) -> AsyncIterator[TestClient]:
    async with live_gateway(replica) as client:
        yield client


@pytest.fixture(scope="module")
def known() -> dict[str, Output]:
    return {}


@pytest_asyncio.fixture(loop_scope="module")
async def api(client: TestClient, replica: LiveReplica, known: dict[str, Output], path: str) -> AsyncIterator[Api]:
    """For tests that are parametrized with a path and run in the module's event loop."""
    yield Api(client, replica, path, known)
    async with asyncio.timeout(10):  # the last abort may still be on its way
        while replica.core.has_work():
            await asyncio.sleep(0.01)
