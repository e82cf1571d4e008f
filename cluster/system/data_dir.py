"""The folder where a server keeps what outlives it: made private, and claimed for the model it serves.

Knows the folder and its claim. What lies in it is cluster/batch's. The gateways of one deployment share it; a server of another model
may not have it meanwhile, or it would answer lines that were not meant for it.
"""

import errno
import fcntl
import os
from pathlib import Path

from workers.errors import ConfigError

_CLAIM = "model"


def default_data_dir(deployment: str) -> Path:
    """Where the XDG conventions have the data of a user's programs."""
    home = os.environ.get("XDG_DATA_HOME", "")
    base = Path(home) if home.startswith("/") else Path.home() / ".local" / "share"
    return base / "tramontane" / deployment


class DataDir:
    """Made if it is not there, readable by its owner alone. Raises ConfigError. `close` lets go of it, as the process's end does."""

    def __init__(self, path: Path, *, model_name: str) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._fd: int | None = os.open(path / _CLAIM, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as e:
            raise ConfigError(
                f"The data directory {path} cannot be written ({e.strerror}); name another with --data-dir, or add --no-batches."
            ) from e
        try:
            self._claim(self._fd, model_name.encode())
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Idempotent."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def _claim(self, fd: int, model_name: bytes) -> None:
        """Whoever serves the model that the file names holds it together; who wants another name must be alone."""
        try:
            fcntl.flock(fd, fcntl.LOCK_SH)
            if os.pread(fd, 4096, 0) == model_name:
                return
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(fd, 0)
            os.pwrite(fd, model_name, 0)
            fcntl.flock(fd, fcntl.LOCK_SH)
        except BlockingIOError as e:
            raise ConfigError(
                f"The data directory {self.path} is in use by a server of another model; give this one another --name or --data-dir."
            ) from e
        except OSError as e:
            # Some network file systems have no locks; there the operator keeps servers apart.
            if e.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise ConfigError(f"The data directory {self.path} cannot be written ({e.strerror}).") from e
