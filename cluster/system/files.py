"""Whether a file has changed since it was read: what a running server asks of the keys and certificates it was given.

Knows paths and what the file system says of them; reads no file.
"""

from pathlib import Path


def version_of(path: Path) -> tuple[int, ...] | None:
    """What changes when the file does; None while it is not there."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino
