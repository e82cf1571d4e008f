"""Opens the store and the files of a data directory: SQLite in it, or a PostgreSQL database that several gateways share.

Knows where things lie in the directory, and nothing of what they hold.
"""

from pathlib import Path

from cluster.batch.errors import StoreError
from cluster.batch.files import FileContents
from cluster.batch.store.interface import Store
from cluster.batch.store.sqlite import open_sqlite


def open_store(data_dir: Path, *, database_url: str | None = None) -> Store:
    """`database_url`: postgresql://user@host/database; None for a file in the directory. Raises StoreError."""
    if database_url is None:
        return open_sqlite(data_dir / "batches.db")
    if not database_url.startswith(("postgresql://", "postgres://")):
        raise StoreError("The batch database's address must begin with postgresql://.")
    from cluster.batch.store.postgres import open_postgres  # psycopg is an extra

    return open_postgres(database_url)


def open_files(data_dir: Path) -> FileContents:
    """The files of batches; gateways that share a database share this folder too. Raises StoreError."""
    return FileContents(data_dir / "files")
