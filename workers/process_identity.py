"""What a process id means, so that a later process with the same id, or a process on another host, counts as another one.

Knows Linux's /proc. Where /proc is missing, every process counts as being on another host: nothing is known about it.
"""

import os
from pathlib import Path

import msgspec

PF_EXITING = 4  # Linux's flag of a process that is giving its memory back


class ProcessIdentity(msgspec.Struct, frozen=True, kw_only=True):
    """A process, for as long as the machine runs. Equal identities are the same process.

    pid: its id within `pid_namespace`. born: its start in clock ticks since boot. boot_id: the machine's current boot.
    The last three are None where they are unknown.
    """

    pid: int
    born: int | None
    boot_id: str | None
    pid_namespace: str | None


def this_process() -> ProcessIdentity:
    pid = os.getpid()
    boot_id, pid_namespace = _pid_space()
    return ProcessIdentity(pid=pid, born=born_at(pid), boot_id=boot_id, pid_namespace=pid_namespace)


def is_here(process: ProcessIdentity) -> bool:
    """Whether its pid means the same to this process: same boot, same pid namespace."""
    known = process.born is not None and process.boot_id is not None and process.pid_namespace is not None
    return known and (process.boot_id, process.pid_namespace) == _pid_space()


def is_alive(process: ProcessIdentity) -> bool:
    """Whether a process that `is_here` still runs, or could run again after a stop."""
    return born_at(process.pid) == process.born


def is_known_dead(process: ProcessIdentity) -> bool:
    """False also for a process that cannot be seen from here."""
    return is_here(process) and not is_alive(process)


def born_at(pid: int) -> int | None:
    """When the process started, in clock ticks since boot; None if it is dead or dying, reaped or not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()  # the command's name may hold spaces
    # A killed process can take seconds to give back its memory. None of its code runs in that time.
    is_dying = fields[0] in "ZX" or int(fields[6]) & PF_EXITING
    return None if is_dying else int(fields[19])


def _pid_space() -> tuple[str | None, str | None]:
    """The boot and the pid namespace in which this process's pid means something; (None, None) where unknown."""
    try:
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return boot_id, str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return None, None
