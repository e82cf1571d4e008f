"""Files that others read while they change: replaced as a whole, and read again when they have changed. Knows paths and bytes only."""

import contextlib
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

TEMPORARY = ".tmp"


def replace_file(
    path: Path,
    content: bytes | Callable[[BinaryIO], object],
    *,
    mode: int | None = None,
    suffix: str = TEMPORARY,
) -> None:
    """Writes the file so that a reader, also after a crash, finds the whole old file or the whole new one. Raises OSError.

    content: the bytes, or a function that writes them; when it raises, the old file stays. mode: permissions; None keeps those of the old
    file, and a new file gets the usual ones. suffix: of the temporary file's name, which lies in the same folder and is overwritten if a
    killed writer left it. Two writers at the same time need a lock of their own.
    """
    temporary = path.with_name(f"{path.name}{suffix}")
    temporary.unlink(missing_ok=True)
    if mode is None:
        with contextlib.suppress(FileNotFoundError):
            mode = path.stat().st_mode & 0o7777
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    fd = os.open(temporary, flags, 0o666 if mode is None else 0o600)
    try:
        with os.fdopen(fd, "wb") as file:
            if mode is not None:
                os.fchmod(file.fileno(), mode)
            if isinstance(content, bytes):
                file.write(content)
            else:
                content(file)
        move_into_place(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def move_into_place(temporary: Path, path: Path) -> None:
    """Renames a complete file, closed and in the same folder, to `path`. Once this returns, it survives a power failure. Raises OSError."""
    _sync(temporary)
    temporary.replace(path)
    try:
        _sync(path.parent)
    except OSError as e:  # some network file systems cannot sync a folder
        if e.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def version_of(path: Path) -> tuple[int, ...] | None:
    """A value that changes when the file does; None while it does not exist."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


def has_files(folder: str) -> bool:
    """Whether the folder exists and is not empty."""
    path = Path(folder)
    return path.is_dir() and next(path.iterdir(), None) is not None
