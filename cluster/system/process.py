"""The name under which a process holds a lease. Others on the same host can tell from it that the process is dead, and need not wait.

About another host, container or boot nothing can be said; there the lease's time limit decides.
"""

import socket
import uuid

from workers.process_identity import ProcessIdentity, is_known_dead, this_process

_NUM_PARTS = 6


def new_owner() -> str:
    """A new name of this process; one process may hold several leases under different names."""
    me = this_process()
    parts = (socket.gethostname(), me.boot_id or "", me.pid_namespace or "", me.pid, me.born, uuid.uuid4().hex[:8])
    return "/".join(map(str, parts))


def is_dead(owner: str) -> bool:
    """Whether that process is known to be dead. False for a process that cannot be seen from here, and for unknown names."""
    parts = owner.split("/")
    if len(parts) != _NUM_PARTS:
        return False
    host, boot_id, pid_namespace, pid, born, _ = parts
    if host != socket.gethostname() or not pid.isdigit() or not born.isdigit():
        return False
    return is_known_dead(
        ProcessIdentity(pid=int(pid), born=int(born), boot_id=boot_id or None, pid_namespace=pid_namespace or None)
    )
