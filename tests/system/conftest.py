"""One real server with two ranks for the files that leave it as it was. test_serve.py stops it."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.servers.system_server import Server


@pytest.fixture(scope="session")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that the server below writes once it has computed some steps."""
    return tmp_path_factory.mktemp("profile") / "trace.json"


@pytest.fixture(scope="session")
def server(profile: Path) -> Iterator[Server]:
    options = ("--tensor-parallel-size", "2", "--drain-timeout", "20")
    environ = {**os.environ, "RAY_metrics_report_interval_ms": "500"}  # instead of 10 s, which a test would wait for
    server = Server(*options, "--profile", str(profile), "--profile-steps", "20", env=environ)
    yield server
    server.kill()
