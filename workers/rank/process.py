"""A rank's process as the other ranks know it, and how to end it without hitting another. Knows pids and signals; no sockets."""

import contextlib
import os
import signal

import msgspec

from workers.process_identity import ProcessIdentity, is_alive, is_here, this_process


class RankProcess(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank says in its hello: which rank it is, in which process, and (followers only) the replica's secret."""

    rank: int
    process: ProcessIdentity
    token: str | None = None


def this_rank(rank: int, token: str | None = None) -> RankProcess:
    return RankProcess(rank=rank, process=this_process(), token=token)


def kill_if_here(process: ProcessIdentity) -> bool:
    """SIGKILL, if the process is on this host and still the one that said hello: a frozen one would keep its memory forever."""
    if not is_here(process) or process.pid == os.getpid():
        return False
    with contextlib.suppress(OSError):  # dead, or another user's
        fd = os.pidfd_open(process.pid)
        try:
            # The descriptor pins the process, so what is compared now is what is killed.
            if is_alive(process):
                signal.pidfd_send_signal(fd, signal.SIGKILL)
                return True
        finally:
            os.close(fd)
    return False
