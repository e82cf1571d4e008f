"""The contents of uploaded and generated files: one file each, in a folder of the data directory. Knows no records and no HTTP.

A file is complete or absent: it is written under a temporary name, synced to disk and renamed. After a crash a temporary file may remain;
`strays` removes it a day later. Several gateways may share the folder, as they share the database.
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

from cluster.batch.errors import NOTHING_LOST, StoreError
from cluster.system.files import TEMPORARY, move_into_place
from workers.errors import RequestError

T = TypeVar("T")
MAX_FILE_BYTES = 8 * 1024**3
STRAY_AFTER_S = 86_400
_ID = re.compile(r"[A-Za-z0-9_-]{1,100}")


def _open_new(path: Path) -> BinaryIO:
    return open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")  # noqa: PTH123 - it outlives this call


class FileContents:
    """Reads and writes files by id. Raises StoreError when the folder cannot be created.

    open_new: creates a file for writing; tests pass one that fails.
    """

    def __init__(
        self, folder: Path, *, max_bytes: int = MAX_FILE_BYTES, open_new: Callable[[Path], BinaryIO] = _open_new
    ) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._open_new = open_new
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as e:
            raise StoreError(
                f"The folder {folder} for batch files cannot be created: {e.strerror}.",
                remedy="Make its parent folder writable, or choose another data directory.",
            ) from e

    async def write(self, file_id: str, chunks: AsyncIterable[bytes]) -> int:
        """Stores a file and returns its size in bytes.

        Raises RequestError for more than `max_bytes`, and StoreError when the file cannot be written.
        """
        async with self.create(file_id) as new:
            async for chunk in chunks:
                if new.num_bytes + len(chunk) > self._max_bytes:
                    raise RequestError(
                        f"The file is larger than the limit of {self._max_bytes:,} bytes.",
                        remedy="Split it into smaller files.",
                        param="file",
                        code="file_too_large",
                    )
                await new.write(chunk)
            await new.commit()
        return new.num_bytes

    def create(self, file_id: str) -> "NewFile":
        """Use it in `async with`. The file is removed at the end of the block unless it was committed."""
        return NewFile(self.path(file_id), self._open_new)

    async def chunks(self, file_id: str, *, chunk_bytes: int = 1024 * 1024) -> AsyncIterator[bytes]:
        """The whole file in order. Raises StoreError when it does not exist."""
        source = await asyncio.to_thread(self.open, file_id)
        try:
            while chunk := await asyncio.to_thread(_guarded, "read", lambda: source.read(chunk_bytes)):
                yield chunk
        finally:
            source.close()

    def open(self, file_id: str) -> BinaryIO:
        """Opens the file for reading. Blocks, so call it in a thread."""
        return _guarded("read", lambda: self.path(file_id).open("rb"))

    async def read_parts(self, file_id: str, parts: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes of each (offset, length)."""

        def read() -> list[bytes]:
            with self.open(file_id) as source:
                return _guarded("read", lambda: [os.pread(source.fileno(), n, offset) for offset, n in parts])

        return await asyncio.to_thread(read)

    def path(self, file_id: str) -> Path:
        """The file's path, whether or not it exists. Raises StoreError for an invalid id."""
        if _ID.fullmatch(file_id) is None:
            raise StoreError("A file id consists of letters, digits, hyphens and underscores.")
        return self._folder / file_id

    async def delete(self, file_id: str) -> None:
        """Idempotent."""
        path = self.path(file_id)
        await asyncio.to_thread(_guarded, "deleted", lambda: path.unlink(missing_ok=True))

    async def strays(self, *, older_than_s: float = STRAY_AFTER_S) -> list[str]:
        """Removes old temporary files and returns the ids of old files. The store knows which of these have a record."""

        def scan() -> list[str]:
            before = time.time() - older_than_s
            found = []
            for entry in os.scandir(self._folder):
                with contextlib.suppress(FileNotFoundError):  # another gateway may have deleted it
                    if entry.stat().st_mtime >= before:
                        continue
                    if entry.name.endswith(TEMPORARY):
                        Path(entry.path).unlink()
                    elif _ID.fullmatch(entry.name):
                        found.append(entry.name)
            return found

        return await asyncio.to_thread(_guarded, "read", scan)


class NewFile:
    """A file that is being written. Any disk failure is a StoreError and leaves nothing under the file's own name."""

    def __init__(self, path: Path, open_new: Callable[[Path], BinaryIO]) -> None:
        self._path = path
        self._temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}{TEMPORARY}")
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
        """Puts the file in place. Once this returns it survives a power failure."""
        await asyncio.to_thread(_guarded, "written", self._commit)

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self._discard)

    def _opened(self) -> BinaryIO:
        assert self._file is not None, "write inside `async with`, before commit"
        return self._file

    def _commit(self) -> None:
        file = self._opened()
        file.flush()
        file.close()
        self._file = None
        move_into_place(self._temporary, self._path)

    def _discard(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # closing flushes the buffer, which fails again on a full disk
                self._file.close()
            self._file = None
        with contextlib.suppress(OSError):
            self._temporary.unlink(missing_ok=True)


def _guarded(verb: str, work: Callable[[], T]) -> T:
    try:
        return work()
    except FileNotFoundError as e:
        raise StoreError(f"A batch file cannot be {verb}: it does not exist.") from e
    except OSError as e:
        raise StoreError(f"A batch file cannot be {verb}: {e.strerror or e}.", remedy=NOTHING_LOST) from e
