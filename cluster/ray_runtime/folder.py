"""The folder of a Ray of our own, and the processes that carry its name in their environment: made, ended, and swept.

A command locks its folder for as long as it lives. So after a SIGKILL, at whatever moment, the next command finds a folder without a
lock: it ends what still runs there and removes the files. Knows Linux's /proc, and no Ray.
"""

import atexit
import contextlib
import fcntl
import logging
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path

log = logging.getLogger(__name__)

MARK = "TRAMONTANE_RAY_FOLDER"  # in the environment of every process of a Ray of ours
PREFIX = "tramontane-ray-"
KILL_TIMEOUT_S = 10.0


class RayFolder:
    """A folder that this process has locked, because it made the folder or sweeps it."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock: int | None = lock

    def end(self) -> None:
        """Ends every process of the cluster in it, and removes it. Idempotent."""
        if self._lock is None:
            return
        deadline = time.monotonic() + KILL_TIMEOUT_S
        while pids := marked_processes(self.path):
            if time.monotonic() > deadline:
                log.error("Processes %s of Ray cannot be ended; they may hang in the kernel.", pids)
                break
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)
        self._lock = None


def make_folder(parent: Path) -> RayFolder:
    """A new folder in `parent`, which is removed at the latest when this process ends."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        if (folder := _lock(path)) is not None:  # else a sweep was faster
            # Runs after Ray's own handlers, which still write there.
            atexit.register(shutil.rmtree, path, ignore_errors=True)
            return folder


def sweep(parent: Path) -> None:
    """Ends and removes what killed commands left in `parent`. Folders of other users stay."""
    for path in parent.glob(f"{PREFIX}*"):
        if (folder := _lock(path)) is not None:
            log.info("Removing %s, left by a command that was killed.", path)
            folder.end()


def marked_processes(folder: Path) -> list[int]:
    """Pids of the living processes of the cluster in `folder`, wherever they are in the process tree. Linux only; elsewhere none."""
    mark = f"{MARK}={folder}".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


def _lock(path: Path) -> RayFolder | None:
    """None while a living process has locked it, and for anything that is not a folder of ours."""
    try:
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(lock).st_uid == os.geteuid() and os.fstat(lock).st_nlink:  # no links: it has just been removed
            return RayFolder(path, lock)
    except OSError:
        pass
    os.close(lock)
    return None
