"""Opens files of a checkpoint folder, which comes from strangers: only regular files inside the folder, and only JSON of a sane size.

Knows paths and JSON; no field and no tensor. A folder of the Hub's cache has links to its own `blobs`, which are allowed:
models--owner--name/snapshots/REVISION/config.json is a link to models--owner--name/blobs/HASH.
"""

import json
import stat
from pathlib import Path
from typing import Any

from workers.errors import ConfigError

# Of files other than weights. Configuration files have kilobytes; an index of a large model or a tokenizer's settings have a few megabytes.
MAX_SMALL_BYTES = 64 << 20
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def find_regular_file(folder: Path, name: str) -> Path | None:
    """The path of that file, None if there is none. Never blocks. Raises ConfigError for what is not a regular file in the folder."""
    path = folder / name
    try:
        target = path.resolve(strict=True)
        mode = target.stat().st_mode
    except FileNotFoundError:
        if path.is_symlink():
            raise ConfigError(
                f"{path} is a link to a file that does not exist.", remedy="Copy the file into the folder."
            ) from None
        return None
    except (OSError, RuntimeError, ValueError) as e:
        raise ConfigError(f"{path} cannot be opened: {e}.", remedy="Check the path and its permissions.") from e
    if not is_inside(folder, target):
        raise ConfigError(
            f"{path} is outside the model folder, where no file is opened.", remedy="Copy the file into the folder."
        )
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "something else")
        raise ConfigError(f"{path} is {kind}, not a regular file.", remedy="Replace it with the file itself.")
    return path


def is_inside(folder: Path, target: Path) -> bool:
    """Whether a resolved path is in the folder, or in the blobs of the Hub's cache that the folder is a snapshot of."""
    folder = folder.resolve()
    repository = folder.parent.parent
    return target.is_relative_to(folder) or (
        folder.parent.name == "snapshots" and target.is_relative_to(repository / "blobs")
    )


def check_small_file(folder: Path, name: str) -> Path | None:
    """As `find_regular_file`. Also raises ConfigError for a file that is larger than any honest one."""
    path = find_regular_file(folder, name)
    if path is not None and (num_bytes := path.stat().st_size) > MAX_SMALL_BYTES:
        raise ConfigError(
            f"{path} has {num_bytes:,} bytes.", remedy=f"Use a file of at most {MAX_SMALL_BYTES:,} bytes."
        )
    return path


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise ConfigError(f"{path} is not UTF-8 text.", remedy="Download it again.") from e
    except OSError as e:
        raise ConfigError(f"{path} cannot be read: {e.strerror}.", remedy="Check its permissions.") from e


def _parse_object(text: str, path: Path) -> dict[str, Any]:
    """Raises ConfigError for what is not a JSON object."""
    try:
        value = json.loads(text)
    except RecursionError as e:
        raise ConfigError(f"{path} is nested too deeply.", remedy="Download it again.") from e
    except ValueError as e:
        raise ConfigError(f"{path} is not valid JSON: {e}.", remedy="Download it again.") from e
    if not isinstance(value, dict):
        raise ConfigError(f"{path} is not a JSON object.", remedy="Download it again.")
    return value


def read_object(folder: Path, name: str) -> dict[str, Any] | None:
    """The JSON object in that file; None if there is no such file. Raises ConfigError."""
    path = check_small_file(folder, name)
    return None if path is None else _parse_object(_read_text(path), path)


def shown(value: object) -> str:
    """A value from a file as a message shows it: never longer than a line."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, or a deep list
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."
