"""A rank's process as the other ranks know it: where it runs, whether it still does, and how to end it without hitting another.

Knows pids, and what makes one mean the same process to two others. Where /proc is missing, every process counts as elsewhere.
"""

import contextlib
import os
import signal
from pathlib import Path

import msgspec

from workers.parallel.shared_file import birth


class RankProcess(msgspec.Struct, frozen=True, kw_only=True):
    """A rank's process. `born` and `host` tell it from a later process, or one elsewhere, with the same pid."""

    rank: int
    pid: int
    born: int | None
    host: str | None
    token: str | None = None  # in a follower's hello: the replica's secret


def this_process(rank: int, token: str | None = None) -> RankProcess:
    return RankProcess(rank=rank, pid=os.getpid(), born=birth(os.getpid()), host=pid_space(), token=token)


def is_here(process: RankProcess) -> bool:
    """Whether its pid means something to this process."""
    return process.born is not None and process.host is not None and process.host == pid_space()


def is_alive(process: RankProcess) -> bool:
    """Of a process that is here: whether it still runs, or could again."""
    return birth(process.pid) == process.born


def kill_if_here(process: RankProcess) -> bool:
    """SIGKILL, if the process is on this host and still the one that said hello: a frozen one would keep its memory for ever."""
    if not is_here(process) or process.pid == os.getpid():
        return False
    with contextlib.suppress(OSError):  # gone, or another user's
        fd = os.pidfd_open(process.pid)
        try:
            # The descriptor pins the process, so what is compared now is what is killed.
            if is_alive(process):
                signal.pidfd_send_signal(fd, signal.SIGKILL)
                return True
        finally:
            os.close(fd)
    return False


def pid_space() -> str | None:
    """Names the kernel and the pid namespace in which this process's pid means something; None where that cannot be told."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return None
