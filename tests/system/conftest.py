"""One real server with two ranks for the files that leave it as it was. test_serve.py stops it."""

from collections.abc import Iterator

import pytest
from support.servers.system_server import Server


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    server = Server("--tensor-parallel-size", "2", "--drain-timeout", "20")
    yield server
    server.kill()
