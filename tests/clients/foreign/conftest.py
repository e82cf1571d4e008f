"""What the foreign clients share: the server's address, and the check that they connect to nothing else."""

import os
import sys

import pytest


def _loopback_only(event: str, args: tuple) -> None:
    if event == "socket.connect" and isinstance(args[1], tuple) and args[1][0] not in ("127.0.0.1", "::1"):
        raise ConnectionError(f"a client wanted to reach {args[1]}")


sys.addaudithook(_loopback_only)


@pytest.fixture(scope="session")
def url() -> str:
    return os.environ["TRAMONTANE_URL"] + "/v1"


@pytest.fixture(scope="session")
def key() -> str:
    return os.environ["TRAMONTANE_API_KEY"]
