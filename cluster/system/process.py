"""Who holds a lease: a name for this process from which others on the same host can tell that it is dead, and need not wait.

Knows Linux' /proc. Of another host, container or boot nothing can be told; there the lease's time decides.
"""

import os
import socket
import uuid
from pathlib import Path


def new_owner() -> str:
    """One process may have several."""
    pid = os.getpid()
    return "/".join((*_place(), str(pid), str(_started_at(pid)), uuid.uuid4().hex[:8]))


def is_dead(owner: str) -> bool:
    """Whether that process surely no longer lives. False for one that cannot be seen from here."""
    *place, pid, started_at, _ = owner.split("/")
    if tuple(place) != _place() or not place[-1] or not pid.isdigit():
        return False
    return str(_started_at(int(pid))) != started_at


def _place() -> tuple[str, str, str]:
    """Host, boot and process namespace: within the same three a process id means the same. The last is "" where it is not known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        namespace = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return socket.gethostname(), "", ""
    return socket.gethostname(), boot, namespace


def _started_at(pid: int) -> int | None:
    """In the kernel's clock ticks since boot; None for a process that is not there or has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in ("Z", "X") else int(fields[19])
