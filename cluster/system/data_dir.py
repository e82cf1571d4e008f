"""The folder where a server keeps data that outlives it: private, and claimed for the model it serves.

Knows the folder and its claim; cluster/batch knows the contents. The gateways of one deployment share it. A server of another model may
not use it at the same time, or it would answer lines that were not meant for it.
"""

import errno
import fcntl
import os
from pathlib import Path

from workers.errors import ConfigError

_CLAIM = "model"


def default_data_dir(deployment: str) -> Path:
    """Where the XDG conventions put the data of a user's programs."""
    home = os.environ.get("XDG_DATA_HOME", "")
    base = Path(home) if home.startswith("/") else Path.home() / ".local" / "share"
    return base / "tramontane" / deployment


class DataDir:
    """Created if it does not exist, readable by its owner alone. Raises ConfigError.

    `close` releases the claim, as the end of the process does.
    """

    def __init__(self, path: Path, *, model_name: str) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._fd: int | None = os.open(path / _CLAIM, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as e:
            raise self._unwritable(e) from e
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
        """Servers of the model that the file names share the lock; a server of another model needs it alone."""
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
                f"The data directory {self.path} is in use by a server of another model.",
                remedy="Give this server another --name or --data-dir.",
                param="--data-dir",
            ) from e
        except OSError as e:
            # Some network file systems have no locks; there the operator keeps servers apart.
            if e.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise self._unwritable(e) from e

    def _unwritable(self, error: OSError) -> ConfigError:
        return ConfigError(
            f"The data directory {self.path} cannot be written ({error.strerror}).",
            remedy="Choose another with --data-dir, or add --no-batches.",
            param="--data-dir",
        )
