"""The contents of uploaded and of made files, one file each in a folder of the data directory. Knows no records and no HTTP.

A file is there whole or not at all: it is written under a temporary name, brought to the disk, and renamed. What a crash leaves is a
temporary file, which `sweep` removes a day later. Several gateways share the folder as they share the database.
"""

import asyncio
import contextlib
import os
import re
import time
import uuid
from collections.abc import AsyncIterable, AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import BinaryIO, TypeVar

from cluster.batch.errors import StoreError
from workers.errors import RequestError

T = TypeVar("T")
MAX_FILE_BYTES = 8 * 1024**3
STRAY_AFTER_S = 86_400
_TEMPORARY = ".tmp"
_ID = re.compile(r"[A-Za-z0-9_-]{1,100}")


def _open_new(path: Path) -> BinaryIO:
    return open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")  # noqa: PTH123 - it outlives this call


class FileContents:
    """`open_new` makes a file for writing; tests pass one that fails. Raises StoreError when the folder cannot be made."""

    def __init__(
        self, folder: Path, *, max_bytes: int = MAX_FILE_BYTES, open_new: Callable[[Path], BinaryIO] = _open_new
    ) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._open_new = open_new
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as e:
            raise StoreError(f"The folder {folder} for the files of batches cannot be made: {e.strerror}.") from e

    async def write(self, file_id: str, chunks: AsyncIterable[bytes]) -> int:
        """Stores a file and returns its bytes. Raises RequestError beyond `max_bytes`, and StoreError when it cannot be written."""
        async with self.create(file_id) as new:
            async for chunk in chunks:
                if new.num_bytes + len(chunk) > self._max_bytes:
                    raise RequestError(
                        f"The file is larger than the {self._max_bytes:,} bytes that are allowed; split it.",
                        param="file",
                        code="file_too_large",
                    )
                await new.write(chunk)
            await new.commit()
        return new.num_bytes

    def create(self, file_id: str) -> "NewFile":
        """For use in `async with`: gone at its end unless it was committed."""
        return NewFile(self.path(file_id), self._open_new)

    async def chunks(self, file_id: str, *, chunk_bytes: int = 1024 * 1024) -> AsyncIterator[bytes]:
        """From the beginning to the end. Raises StoreError when it is not there."""
        source = await asyncio.to_thread(self.open, file_id)
        try:
            while chunk := await asyncio.to_thread(_guarded, "read", lambda: source.read(chunk_bytes)):
                yield chunk
        finally:
            source.close()

    def open(self, file_id: str) -> BinaryIO:
        """For reading, in a thread."""
        return _guarded("read", lambda: self.path(file_id).open("rb"))

    async def read_parts(self, file_id: str, parts: Sequence[tuple[int, int]]) -> list[bytes]:
        """Of each (offset, length), its bytes."""

        def read() -> list[bytes]:
            with self.open(file_id) as source:
                return _guarded("read", lambda: [os.pread(source.fileno(), n, offset) for offset, n in parts])

        return await asyncio.to_thread(read)

    def path(self, file_id: str) -> Path:
        """Where it lies, if it is there. Raises StoreError for an id that can be none."""
        if _ID.fullmatch(file_id) is None:
            raise StoreError("A file's id consists of letters, digits, hyphens and underscores.")
        return self._folder / file_id

    async def delete(self, file_id: str) -> None:
        """Idempotent."""
        path = self.path(file_id)
        await asyncio.to_thread(_guarded, "deleted", lambda: path.unlink(missing_ok=True))

    async def strays(self, *, older_than_s: float = STRAY_AFTER_S) -> list[str]:
        """Removes old temporary files, and returns the ids of old files; which of them have records, the store knows."""

        def look() -> list[str]:
            before = time.time() - older_than_s
            found = []
            for entry in os.scandir(self._folder):
                with contextlib.suppress(FileNotFoundError):  # others delete too
                    if entry.stat().st_mtime >= before:
                        continue
                    if entry.name.endswith(_TEMPORARY):
                        Path(entry.path).unlink()
                    elif _ID.fullmatch(entry.name):
                        found.append(entry.name)
            return found

        return await asyncio.to_thread(_guarded, "read", look)


class NewFile:
    """A file being written. Any failure of the disk is a StoreError, and leaves nothing at the file's own name."""

    def __init__(self, path: Path, open_new: Callable[[Path], BinaryIO]) -> None:
        self._path = path
        self._temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}{_TEMPORARY}")
        self._open_new = open_new
        self._file: BinaryIO | None = None
        self.num_bytes = 0

    async def __aenter__(self) -> "NewFile":
        self._file = await asyncio.to_thread(_guarded, "written", lambda: self._open_new(self._temporary))
        return self

    async def write(self, data: bytes) -> None:
        file = self._opened()
        await asyncio.to_thread(_guarded, "written", lambda: file.write(data))
        self.num_bytes += len(data)

    async def commit(self) -> None:
        """From here on it is there, also after a power cut."""
        await asyncio.to_thread(_guarded, "written", self._commit)

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self._discard)

    def _opened(self) -> BinaryIO:
        assert self._file is not None, "write inside `async with`, before commit"
        return self._file

    def _commit(self) -> None:
        file = self._opened()
        file.flush()
        os.fsync(file.fileno())
        file.close()
        self._file = None
        self._temporary.replace(self._path)
        folder = os.open(self._path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _discard(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # closing writes what is buffered, which a full disk refuses again
                self._file.close()
            self._file = None
        with contextlib.suppress(OSError):
            self._temporary.unlink(missing_ok=True)


def _guarded(verb: str, work: Callable[[], T]) -> T:
    try:
        return work()
    except FileNotFoundError as e:
        raise StoreError(f"A file of the batches cannot be {verb}: it is not there.") from e
    except OSError as e:
        raise StoreError(
            f"A file of the batches cannot be {verb}: {e.strerror or e}. Nothing that was stored is lost."
        ) from e
