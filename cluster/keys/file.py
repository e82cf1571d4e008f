"""The file of keys: JSON that a person can read, replaced as a whole, readable by its owner only.

Knows the format, the lock that keeps two writers from losing each other's key, and where the file is when nobody says. It holds no
secret, but whoever could write it could let himself in.
"""

import contextlib
import fcntl
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec

from cluster.keys.key import ApiKey
from workers.errors import ConfigError

API_KEYS_ENV = "TRAMONTANE_API_KEYS"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")


class _Content(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    version: int
    keys: list[ApiKey]


def default_path() -> Path:
    """TRAMONTANE_API_KEYS, or keys.json in the user's configuration folder."""
    if given := os.environ.get(API_KEYS_ENV):
        return Path(given)
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "tramontane" / "keys.json"


def read_keys(path: Path) -> list[ApiKey]:
    """Raises ConfigError for a file that is missing, unreadable or not ours."""
    try:
        data = path.read_bytes()
    except FileNotFoundError as e:
        raise ConfigError(
            f"There is no API keys file {path}; make one with `tramontane keys create NAME --file {path}`."
        ) from e
    except OSError as e:
        raise ConfigError(f"The API keys file {path} cannot be read: {e.strerror}.") from e
    try:
        content = msgspec.json.decode(data, type=_Content)
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        raise ConfigError(f"The API keys file {path} is broken ({e}); repair it or restore it from a backup.") from e
    if content.version != 1:
        raise ConfigError(
            f"The API keys file {path} has version {content.version}; this Tramontane reads version 1: use the one that wrote it."
        )
    for what in ("id", "name", "sha256"):
        values = [getattr(key, what) for key in content.keys]
        if len(set(values)) < len(values):
            raise ConfigError(f"Two keys in the API keys file {path} have the same {what}; remove one of them.")
    return content.keys


def add_key(path: Path, key: ApiKey) -> None:
    """Makes the file if need be. Raises ConfigError, also for a name that is taken or cannot be used."""
    if not _NAME.fullmatch(key.name):
        raise ConfigError(
            "A key's name starts with a letter or digit and goes on with at most 63 letters, digits, dots, hyphens, underscores or @."
        )

    def change(keys: list[ApiKey]) -> list[ApiKey]:
        if any(key.name in (other.name, other.id) for other in keys):
            raise ConfigError(f"There is a key {key.name!r} already; choose another name, or revoke that one first.")
        return [*keys, key]

    with contextlib.suppress(FileExistsError):
        path.parent.mkdir(mode=0o700, parents=True)
    _change(path, change, must_exist=False)


def revoke_key(path: Path, id_or_name: str) -> ApiKey:
    """Returns the key that is no more. Raises ConfigError when there is none."""
    revoked: list[ApiKey] = []

    def change(keys: list[ApiKey]) -> list[ApiKey]:
        revoked.extend(key for key in keys if id_or_name in (key.id, key.name))
        if not revoked:
            raise ConfigError(f"There is no key {id_or_name!r}; `tramontane keys list` shows them.")
        return [key for key in keys if key not in revoked]

    _change(path, change, must_exist=True)
    return revoked[0]


def _change(path: Path, change: Callable[[list[ApiKey]], Sequence[ApiKey]], *, must_exist: bool) -> None:
    try:
        with _locked(path):
            keys = read_keys(path) if must_exist or path.exists() else []
            _replace(path, msgspec.json.encode(_Content(version=1, keys=list(change(keys)))))
    except OSError as e:
        raise ConfigError(f"The API keys file {path} cannot be written: {e.strerror}.") from e


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """The lock is a file of its own: the keys' file is another one after each change."""
    lock = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _replace(path: Path, data: bytes) -> None:
    """Whatever happens meanwhile, a reader finds all of the old file or all of the new one."""
    path = path.resolve()  # a link stays a link
    new = path.with_name(path.name + ".new")
    new.unlink(missing_ok=True)  # of a writer that was killed; ours alone, behind the lock
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(msgspec.json.format(data, indent=2) + b"\n")
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
