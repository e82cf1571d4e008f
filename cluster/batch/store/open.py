"""Opens the store and the files of a data directory: SQLite inside it, or a PostgreSQL database that several gateways share.

Knows the names in the directory, not their contents.
"""

from pathlib import Path

from cluster.batch.errors import StoreError
from cluster.batch.files import FileContents
from cluster.batch.store.interface import Store
from cluster.batch.store.sqlite import open_sqlite

SQLITE_NAME = "batches.db"


def open_store(data_dir: Path, *, database_url: str | None = None) -> Store:
    """database_url: postgresql://user@host/database, or None for a file in the directory. Raises StoreError."""
    if database_url is None:
        return open_sqlite(data_dir / SQLITE_NAME)
    if not database_url.startswith(("postgresql://", "postgres://")):
        raise StoreError("The URL of the batch database must start with postgresql://.", param="--batch-store")
    from cluster.batch.store.postgres import open_postgres  # psycopg is an extra

    return open_postgres(database_url)


def open_files(data_dir: Path) -> FileContents:
    """The batch files. Gateways that share a database must share this folder too. Raises StoreError."""
    return FileContents(data_dir / "files")
