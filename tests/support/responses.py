"""A client of /v1/responses for tests: bodies, events and their bytes."""

import json
from collections.abc import AsyncIterator
from typing import Any

from aiohttp.test_utils import TestClient

PATH = "/v1/responses"


async def post(client: TestClient, body: dict[str, Any], **options: Any) -> dict[str, Any]:
    """A response that is not streamed."""
    response = await client.post(PATH, json={"model": "demo", "input": "x", "seed": 1, **body}, **options)
    assert response.status == 200, await response.text()
    return await response.json()


async def refusal(client: TestClient, body: dict[str, Any], *, path: str = PATH, status: int = 400) -> dict[str, Any]:
    """The error of a body that is refused."""
    response = await client.post(path, json={"model": "demo", "input": "x", **body})
    assert response.status == status, await response.text()
    return (await response.json())["error"]


async def events_in(lines: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Each event's bytes, without comments."""
    event = b""
    async for line in lines:
        event += line
        if line == b"\n":
            if not event.startswith(b":"):
                yield event
            event = b""


async def create_stream(client: TestClient, body: dict[str, Any]) -> AsyncIterator[bytes]:
    async with client.post(PATH, json={"model": "demo", "input": "x", "seed": 1, **body, "stream": True}) as response:
        assert response.status == 200, await response.text()
        async for event in events_in(response.content):
            yield event


async def again(client: TestClient, response_id: str, *, after: int = -1, **options: Any) -> list[bytes]:
    """The events after number `after` to the end."""
    query = {"stream": "true", "starting_after": str(after)}
    async with client.get(f"{PATH}/{response_id}", params=query, **options) as response:
        assert response.status == 200, await response.text()
        return [event async for event in events_in(response.content)]


def read(event: bytes) -> dict[str, Any]:
    """An event's data. Its name agrees with it."""
    name, data = event.decode().rstrip("\n").split("\n")
    value: dict[str, Any] = json.loads(data.removeprefix("data: "))
    assert name == f"event: {value['type']}"
    return value
