"""Files are complete or absent, limited in size, and stored under ids that cannot be paths."""

import os
import time

import pytest

from cluster.batch.errors import StoreError
from cluster.batch.files import FileContents
from workers.errors import RequestError


async def stream(*chunks: bytes):
    for chunk in chunks:
        yield chunk


async def test_written_and_read(tmp_path):
    files = FileContents(tmp_path / "files")
    assert await files.write("file-1", stream(b"abc", b"", b"defg")) == 7
    assert [c async for c in files.chunks("file-1", chunk_bytes=3)] == [b"abc", b"def", b"g"]
    assert await files.read_parts("file-1", [(5, 2), (0, 1)]) == [b"fg", b"a"]
    assert (tmp_path / "files" / "file-1").stat().st_mode & 0o077 == 0, "others cannot read it"
    await files.delete("file-1")
    await files.delete("file-1")
    with pytest.raises(StoreError, match="does not exist"):
        async for _ in files.chunks("file-1"):
            pass


async def test_a_failed_write_leaves_nothing(tmp_path):
    async def breaks():
        yield b"abc"
        raise ConnectionResetError

    files = FileContents(tmp_path, max_bytes=5)
    with pytest.raises(ConnectionResetError):
        await files.write("file-1", breaks())
    with pytest.raises(RequestError, match="larger than the limit of 5 bytes") as caught:
        await files.write("file-1", stream(b"abc", b"def"))
    assert caught.value.code == "file_too_large"
    assert list(tmp_path.iterdir()) == []
    await files.write("file-1", stream(b"12345"))
    with pytest.raises(RequestError):
        await files.write("file-1", stream(b"abcdef"))
    assert files.path("file-1").read_bytes() == b"12345", "the old file stays until the new one is complete"


@pytest.mark.parametrize("name", ["", "../x", "a/b", "a.tmp", ".", "x" * 101, "a\0"])
async def test_ids_that_are_paths_are_refused(tmp_path, name):
    files = FileContents(tmp_path)
    with pytest.raises(StoreError, match="letters, digits"):
        files.path(name)
    with pytest.raises(StoreError, match="letters, digits"):
        await files.delete(name)


async def test_strays(tmp_path):
    files = FileContents(tmp_path)
    for name in ("file-old", "file-new", "file-a.1.tmp", "file-b.2.tmp"):
        (tmp_path / name).write_bytes(b"x")
    for name in ("file-old", "file-a.1.tmp"):
        os.utime(tmp_path / name, (time.time() - 100_000,) * 2)
    assert await files.strays() == ["file-old"]
    assert {p.name for p in tmp_path.iterdir()} == {"file-old", "file-new", "file-b.2.tmp"}
