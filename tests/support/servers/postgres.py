"""A PostgreSQL server for tests, if one is installed. It only listens on a socket in its own folder, which is removed at the end."""

import contextlib
import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

_numbers = itertools.count(1)


def _find(name: str) -> str | None:
    places = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), reverse=True)
    return str(places[0]) if places else shutil.which(name)


@contextlib.contextmanager
def postgres_server() -> Iterator[str]:
    """Yields the folder of the server's socket. The superuser `tester` needs no password. Skips the test if no server is installed."""
    initdb, server = _find("initdb"), _find("postgres")
    if initdb is None or server is None:
        pytest.skip("no PostgreSQL server is installed (Debian package postgresql)")
    pytest.importorskip("psycopg")
    user: dict[str, int] = {}
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        try:
            account = pwd.getpwnam("postgres")
        except KeyError:
            pytest.skip("no user postgres to run a PostgreSQL server as")
        user = {"user": account.pw_uid, "group": account.pw_gid}
    folder = Path(tempfile.mkdtemp(prefix="tramontane-pg-", dir="/tmp"))
    try:
        if user:
            os.chown(folder, user["user"], user["group"])
        data = folder / "data"
        subprocess.run(
            [initdb, "-D", data, "-U", "tester", "--auth=trust", "--no-sync", "-E", "UTF8", "--locale=C"],
            check=True,
            capture_output=True,
            cwd=folder,
            extra_groups=[] if user else None,
            **user,
        )
        options = ["-c", "listen_addresses=", "-c", f"unix_socket_directories={folder}", "-c", "fsync=off"]
        process = subprocess.Popen(
            [server, "-D", data, *options],
            cwd=folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            extra_groups=[] if user else None,
            **user,
        )
        try:
            _wait(folder, process)
            yield str(folder)
        finally:
            process.send_signal(signal.SIGINT)  # a fast shutdown, which does not wait for clients
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _wait(folder: Path, process: subprocess.Popen) -> None:
    import psycopg

    deadline = time.monotonic() + 30
    while True:
        try:
            psycopg.connect(_url(str(folder), "postgres")).close()
            return
        except psycopg.OperationalError:
            assert process.poll() is None, "the PostgreSQL server ended"
            assert time.monotonic() < deadline, "the PostgreSQL server does not answer"
            time.sleep(0.05)


def _url(folder: str, database: str) -> str:
    return f"postgresql://tester@/{database}?host={folder}"


def new_database(folder: str) -> str:
    """The URL of a new database."""
    import psycopg

    name = f"test_{next(_numbers)}"
    with psycopg.connect(_url(folder, "postgres"), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return _url(folder, name)
