"""Where the contents of adapters are kept on a machine: copies that nothing changes, one folder for each digest.

Knows files, and locks that tell which folders are in use: servers on one machine share the store, and what a killed server left is
removed by the next one. Does not know what is in the files: workers/lora/peft_folder.py reads them.
"""

import contextlib
import fcntl
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from cluster.protocol.names import member_of
from cluster.system.data_dir import default_data_dir
from workers.errors import ConfigError

log = logging.getLogger(__name__)

FILES = ("adapter_config.json", "adapter_model.safetensors")
MAX_BYTES = 4 << 30
_LOCK = "in-use"
_TEMPORARY = ".new-"
_STALE_S = 3600.0  # a temporary folder that is older was left by a killed process


class AdapterStore:
    """Blocking: call it on a thread. What it holds, no other store removes; `close` lets go of everything and removes nothing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._locks: dict[str, int] = {}  # digest -> descriptor
        self._guard = threading.RLock()  # of `_locks`

    def path(self, digest: str) -> Path:
        return self.folder / digest

    @property
    def held(self) -> set[str]:
        """The digests of what it holds."""
        with self._guard:
            return set(self._locks)

    def has(self, digest: str) -> bool:
        """Holds the content from now on, if it is here."""
        with self._guard:
            if digest in self._locks:
                return True
            try:
                fd = os.open(self.path(digest) / _LOCK, os.O_RDWR | os.O_CLOEXEC)
            except OSError:
                return False
            _lock(fd, fcntl.LOCK_SH)
            if not (self.path(digest) / FILES[0]).exists():  # removed a moment ago
                os.close(fd)
                return False
            self._locks[digest] = fd
            return True

    def stage(self, source: Path) -> Path:
        """A private copy of a folder's two files, which the caller examines, and then gives to `keep` or `discard`. Raises ConfigError."""
        return self._temporary(lambda target: [shutil.copyfile(source / name, target / name) for name in FILES])

    def write(self, files: Mapping[str, bytes], digest: str) -> Path:
        """The folder with these contents, by the names of the files. Raises ConfigError."""
        if self.has(digest):
            return self.path(digest)
        return self.keep(
            self._temporary(lambda target: [(target / name).write_bytes(files[name]) for name in FILES]), digest
        )

    def keep(self, staged: Path, digest: str) -> Path:
        """The staged copy is the content of this digest from now on. Raises ConfigError."""
        path = self.path(digest)
        try:
            with self._guard:
                if self.has(digest):
                    return path
                try:
                    fd = os.open(staged / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                    _lock(fd, fcntl.LOCK_SH)
                    staged.rename(path)
                except OSError as e:
                    if self.has(digest):  # another process made it at the same time
                        return path
                    raise self._unwritable(e) from e
                self._locks[digest] = fd
                return path
        finally:
            self.discard(staged)

    def discard(self, staged: Path) -> None:
        """Removes a staged copy. Idempotent."""
        shutil.rmtree(staged, ignore_errors=True)

    def read(self, digest: str) -> dict[str, bytes]:
        """The contents of the files by their names. Raises OSError."""
        return {name: (self.path(digest) / name).read_bytes() for name in FILES}

    def remove(self, digest: str) -> None:
        """Lets go of the content, and removes it unless another server of this machine holds it. Idempotent."""
        with self._guard:
            fd = self._locks.pop(digest, None)
            if fd is None:
                return
            try:
                if _lock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB):
                    shutil.rmtree(self.path(digest), ignore_errors=True)
            finally:
                os.close(fd)

    def release(self, digest: str) -> None:
        """Lets go of the content, and leaves it to those who hold it."""
        with self._guard:
            if (fd := self._locks.pop(digest, None)) is not None:
                os.close(fd)

    def sweep(self, keep: Collection[str] = ()) -> None:
        """Removes what nobody holds, except what is to be kept."""
        if not self.folder.is_dir():
            return
        for path in self.folder.iterdir():
            if path.name.startswith(_TEMPORARY):
                with contextlib.suppress(OSError):
                    if time.time() - path.stat().st_mtime > _STALE_S:
                        shutil.rmtree(path, ignore_errors=True)
            elif path.name not in keep and path.name not in self._locks and self.has(path.name):
                self.remove(path.name)

    def close(self) -> None:
        """Idempotent."""
        for digest in self.held:
            self.release(digest)

    def _temporary(self, fill: Callable[[Path], object]) -> Path:
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            temporary = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=self.folder))
        except OSError as e:
            raise self._unwritable(e) from e
        try:
            fill(temporary)
        except OSError as e:
            self.discard(temporary)
            raise self._unwritable(e) from e
        return temporary

    def _unwritable(self, error: OSError) -> ConfigError:
        return ConfigError(
            f"The adapter cannot be copied to {self.folder} ({error.strerror}).",
            remedy="Make room there, or choose another folder with --data-dir.",
            param="--data-dir",
        )


def adapter_folder(deployment: str, data_dir: str | None) -> Path:
    """The store's folder of a deployment on this machine."""
    if data_dir is None:
        return default_data_dir(deployment) / "adapters"
    return Path(data_dir) / (member_of(deployment) or "") / "adapters"


def size_of(folder: Path) -> int:
    """Bytes of the two files. Raises OSError."""
    return sum((folder / name).stat().st_size for name in FILES)


def _lock(fd: int, how: int) -> bool:
    """False if another process has it. On a file system without locks, everything is in use."""
    try:
        fcntl.flock(fd, how)
    except BlockingIOError:
        return False
    except OSError as e:
        log.debug("No locks on this file system: %s", e)
        return not how & fcntl.LOCK_EX
    return True
