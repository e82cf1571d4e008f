"""Locations of a batch's input and output: a local path, "-" for stdin and stdout, or an object in cloud storage.

Knows fsspec, and which extra installs which storage. Does not know what the files contain. An output is complete or absent: local files
are renamed into place, and a storage shows an object once its last byte has arrived.
"""

import contextlib
import io
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from cluster.system.files import replace_file
from workers.errors import ConfigError, TramontaneError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

STANDARD = "-"
COPY_BYTES = 1024 * 1024
TEMPORARY = ".tramontane-tmp"
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "az": "az", "abfs": "az", "abfss": "az"}
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")


class LocationError(TramontaneError):
    """A location that cannot be read or written now: no permission, no space, no network, or it does not exist."""


def is_address(location: str) -> bool:
    """Whether it is an object in a storage rather than a local path."""
    return "://" in location and not location.startswith("file://")


def absolute(location: str) -> str:
    """The same location, independent of the working directory."""
    if location == STANDARD or is_address(location):
        return location
    return str(local_path(location).absolute())


def local_path(location: str) -> Path:
    return Path(location.removeprefix("file://")).expanduser()


def with_suffix(location: str, suffix: str) -> str:
    """A location next to this one: "out.jsonl" with ".errors" is "out.errors.jsonl"."""
    folder, slash, name = location.rpartition("/")
    stem, dot, ending = name.rpartition(".")
    return f"{folder}{slash}{stem}{suffix}.{ending}" if dot and stem else f"{location}{suffix}"


def plain_name(location: str) -> str:
    """The name without a compression's ending; its own ending then says the format."""
    return next((location.removesuffix(c) for c in _COMPRESSED if location.endswith(c)), location)


@contextlib.contextmanager
def reading(location: str, *, seekable: bool = False) -> Iterator[BinaryIO]:
    """Opens the location for reading, decompressed if the name ends in .gz, .bz2, .xz or .zst. Raises ConfigError and LocationError.

    Errors while reading inside the block become a LocationError too. seekable: whether the format needs it, which stdin cannot offer.
    """
    with _guarded(location, "read"):
        if location == STANDARD:
            if seekable:
                raise ConfigError("This format cannot be read from stdin.", remedy="Give the path of a file as input.")
            yield sys.stdin.buffer
            return
        compressed = plain_name(location) != location
        if not is_address(location) and not compressed:
            with local_path(location).open("rb") as source:
                yield source
            return
        import fsspec

        _file_system(location)
        target = location if is_address(location) else str(local_path(location).absolute())
        with fsspec.open(target, "rb", compression="infer" if compressed else None) as source:
            # A storage's own file object reads complete lines only, whatever their length.
            yield source if compressed else io.BufferedReader(source, COPY_BYTES)


def exists(location: str) -> bool:
    """Raises ConfigError and LocationError."""
    if location == STANDARD:
        return False
    with _guarded(location, "reached"):
        if not is_address(location):
            return local_path(location).exists()
        fs, path = _file_system(location)
        return fs.exists(path)


def num_bytes(location: str) -> int | None:
    """The size, None for stdin. Raises ConfigError and LocationError."""
    if location == STANDARD:
        return None
    with _guarded(location, "read"):
        if not is_address(location):
            return local_path(location).stat().st_size
        fs, path = _file_system(location)
        return fs.size(path)


def names_in_folder_of(location: str) -> list[str]:
    """The names of the files in its folder, including its own if it exists. Raises ConfigError and LocationError."""
    with _guarded(location, "reached"):
        if not is_address(location):
            folder = local_path(location).absolute().parent
            return [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
        fs, path = _file_system(location)
        try:
            return [name.rpartition("/")[2] for name in fs.ls(fs._parent(path), detail=False)]
        except FileNotFoundError:
            return []


def fetch(location: str, target: Path) -> None:
    """Copies an object to a local path. Raises ConfigError and LocationError."""
    fs, path = _file_system(location)
    with _guarded(location, "read"):
        fs.get_file(path, str(target))


def check_writable(location: str) -> None:
    """Checks before hours of work are spent; for a storage, only that its library is installed. Raises ConfigError and LocationError."""
    if location == STANDARD:
        return
    if is_address(location):
        _file_system(location)
        return
    path = local_path(location)
    if path.is_dir():
        raise ConfigError(f"{location} is a folder.", remedy="Give the path of a file in it.")
    probe = path.with_name(f"{path.name}{TEMPORARY}")
    with _guarded(location, "written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        probe.open("wb").close()
        probe.unlink()


def deliver(source: Path, location: str) -> None:
    """Copies `source` there, completely or not at all. May be repeated. Raises LocationError."""
    with _guarded(location, "written"):
        if location == STANDARD:
            with source.open("rb") as file:
                shutil.copyfileobj(file, sys.stdout.buffer, COPY_BYTES)
            sys.stdout.buffer.flush()
        elif is_address(location):
            fs, path = _file_system(location)
            fs.put_file(str(source), path)
        else:
            _replace(source, local_path(location))


def remove(location: str) -> None:
    """Idempotent. Raises LocationError."""
    if location == STANDARD:
        return
    with _guarded(location, "deleted"), contextlib.suppress(FileNotFoundError):
        if is_address(location):
            fs, path = _file_system(location)
            fs.rm_file(path)
        else:
            local_path(location).unlink(missing_ok=True)


def _replace(source: Path, target: Path) -> None:
    with source.open("rb") as file:
        replace_file(target, lambda copy: shutil.copyfileobj(file, copy, COPY_BYTES), suffix=TEMPORARY)


def _file_system(location: str) -> "tuple[AbstractFileSystem, Any]":
    """The storage and the path in it. Raises ConfigError if its library is not installed or its kind is unknown."""
    import fsspec  # late: most commands touch no storage

    scheme = location.partition("://")[0]
    try:
        return fsspec.core.url_to_fs(location)
    except ImportError as e:
        extra = _EXTRAS.get(scheme)
        how = f"Run: pip install 'tramontane[{extra}]'." if extra else "Install the library that fsspec uses for it."
        raise ConfigError(f"{scheme}:// needs a library that is not installed.", remedy=how) from e
    except ValueError as e:
        raise ConfigError(
            f"{scheme}:// is not a supported storage.", remedy="Use s3://, gs://, az:// or a path."
        ) from e


@contextlib.contextmanager
def _guarded(location: str, verb: str) -> Iterator[None]:
    """Turns every exception of a storage library into a LocationError about this location."""
    try:
        yield
    except (TramontaneError, GeneratorExit):
        raise
    except FileNotFoundError as e:
        what = "it" if verb == "read" else "its folder or bucket"
        raise LocationError(f"{location} cannot be {verb}: {what} does not exist.") from e
    except OSError as e:
        raise LocationError(f"{location} cannot be {verb}: {e.strerror or e}.") from e
    except Exception as e:
        if not is_address(location):
            raise
        # The first line only: some messages quote the storage's complete response.
        reason = next(iter(str(e).splitlines()), "").rstrip(".")
        raise LocationError(f"{location} cannot be {verb}: {type(e).__name__}: {reason}.") from e
