"""The limit on open file descriptors: raises it as far as the system allows.

Every connection, file and process pipe is one descriptor. Many systems start a process with a soft limit of 1,024 or less.
"""

import contextlib
import resource
import sys


def raise_limit(wanted: int) -> int:
    """Raises the soft limit to `wanted`, or to the hard limit if that is lower; never lowers it. Returns the limit that holds now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return sys.maxsize
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft < most:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
            return most
    return soft
