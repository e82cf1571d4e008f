"""One real server per test file."""

from collections.abc import Iterator

import pytest
from support.servers.system_server import Server


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server("--tensor-parallel-size", "2", "--drain-timeout", "20")
    yield server
    server.kill()
