"""One real server for every client, with the demo model and a key. What it says is nonsense; these tests look at how it says it."""

from collections.abc import Iterator

import pytest
from system_server import Server


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.kill()
