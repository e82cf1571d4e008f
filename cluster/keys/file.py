"""The keys file: readable JSON, replaced as a whole, with access for its owner only.

Knows the format, the lock that keeps two writers from losing each other's changes, and the default path. The file contains no secrets, but
write access to it means access to the server.
"""

import contextlib
import fcntl
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec

from cluster.keys.key import ApiKey
from cluster.system.files import replace_file
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
    """Raises ConfigError if the file is missing, unreadable or malformed."""
    try:
        data = path.read_bytes()
    except FileNotFoundError as e:
        raise ConfigError(
            f"The API keys file {path} does not exist.",
            remedy=f"Create it with `tramontane keys create NAME --file {path}`.",
        ) from e
    except OSError as e:
        raise ConfigError(f"The API keys file {path} cannot be read: {e.strerror}.") from e
    try:
        content = msgspec.json.decode(data, type=_Content)
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        raise ConfigError(
            f"The API keys file {path} is malformed: {e}.", remedy="Repair it, or restore it from a backup."
        ) from e
    if content.version != 1:
        raise ConfigError(
            f"The API keys file {path} has version {content.version}; this release of Tramontane reads version 1.",
            remedy="Use the release that wrote the file.",
        )
    for what in ("id", "name", "sha256"):
        values = [getattr(key, what) for key in content.keys]
        if len(set(values)) < len(values):
            raise ConfigError(
                f"Two keys in the API keys file {path} have the same {what}.", remedy="Remove one of them."
            )
    return content.keys


def add_key(path: Path, key: ApiKey) -> None:
    """Creates the file if it does not exist. Raises ConfigError, also if the name is taken or invalid."""
    if not _NAME.fullmatch(key.name):
        raise ConfigError(
            f"The name {key.name!r} is invalid.",
            remedy="Start with a letter or digit, followed by at most 63 letters, digits, dots, hyphens, underscores or @.",
        )

    def change(keys: list[ApiKey]) -> list[ApiKey]:
        if any(key.name in (other.name, other.id) for other in keys):
            raise ConfigError(
                f"A key {key.name!r} already exists.", remedy="Choose another name, or revoke that key first."
            )
        return [*keys, key]

    with contextlib.suppress(FileExistsError):
        path.parent.mkdir(mode=0o700, parents=True)
    _change(path, change, must_exist=False)


def revoke_key(path: Path, id_or_name: str) -> ApiKey:
    """Removes the key and returns it. Raises ConfigError if there is no such key."""
    revoked: list[ApiKey] = []

    def change(keys: list[ApiKey]) -> list[ApiKey]:
        revoked.extend(key for key in keys if id_or_name in (key.id, key.name))
        if not revoked:
            raise ConfigError(f"There is no key {id_or_name!r}.", remedy="`tramontane keys list` shows all keys.")
        return [key for key in keys if key not in revoked]

    _change(path, change, must_exist=True)
    return revoked[0]


def _change(path: Path, change: Callable[[list[ApiKey]], Sequence[ApiKey]], *, must_exist: bool) -> None:
    try:
        with _locked(path):
            keys = read_keys(path) if must_exist or path.exists() else []
            content = msgspec.json.encode(_Content(version=1, keys=list(change(keys))))
            # Resolved, so that a link stays a link.
            replace_file(path.resolve(), msgspec.json.format(content, indent=2) + b"\n", mode=0o600)
    except OSError as e:
        raise ConfigError(f"The API keys file {path} cannot be written: {e.strerror}.") from e


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """The lock is a separate file, since each change replaces the keys file."""
    lock = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)
