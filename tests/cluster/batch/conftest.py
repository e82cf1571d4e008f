"""Stores to test: SQLite always, PostgreSQL where a server is installed."""

from collections.abc import Iterator

import pytest
from support.servers.postgres import new_database, postgres_server

from cluster.batch.store.sqlite import open_sqlite


@pytest.fixture(scope="session")
def postgres_socket() -> Iterator[str]:
    with postgres_server() as folder:
        yield folder


@pytest.fixture
def postgres_url(postgres_socket: str) -> str:
    """Of a database of its own."""
    return new_database(postgres_socket)


@pytest.fixture(params=["sqlite", "postgres"])
def reopen(request, tmp_path):
    """Opens the same store each time it is called."""
    if request.param == "sqlite":
        return lambda: open_sqlite(tmp_path / "batches.db")
    url = request.getfixturevalue("postgres_url")
    from cluster.batch.store.postgres import open_postgres

    return lambda: open_postgres(url)


@pytest.fixture
async def store(reopen):
    opened = reopen()
    yield opened
    await opened.close()
