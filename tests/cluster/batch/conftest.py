"""The stores under test: SQLite always, PostgreSQL where a server is installed."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.servers.postgres import new_database, postgres_server

from cluster.batch.store.sqlite import open_sqlite


@pytest.fixture(scope="session")
def postgres_socket() -> Iterator[str]:
    with postgres_server() as folder:
        yield folder


@pytest.fixture
def postgres_url(postgres_socket: str) -> str:
    """The URL of a new database."""
    return new_database(postgres_socket)


@pytest.fixture(params=["sqlite", "postgres"])
def location(request, tmp_path) -> str:
    """The path or the URL of the store under test."""
    return request.getfixturevalue("postgres_url") if request.param == "postgres" else str(tmp_path / "batches.db")


@pytest.fixture
def reopen(location):
    """Opens the same store each time it is called."""
    if not location.startswith("postgresql://"):
        return lambda: open_sqlite(Path(location))
    from cluster.batch.store.postgres import open_postgres

    return lambda: open_postgres(location)


@pytest.fixture
async def store(reopen):
    opened = reopen()
    yield opened
    await opened.close()
