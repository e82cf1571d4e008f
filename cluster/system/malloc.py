"""Makes the C library return large blocks to the system as soon as they are free. Knows glibc; without it, nothing happens.

By default glibc learns from each large block that is freed to keep blocks of that size, up to 32 MiB, and every thread keeps its own. A
gateway parses bodies of megabytes in several threads: after a few hundred of them it held 400 MiB that nothing used.
"""

import ctypes
import os

LARGE_BYTES = 256 * 1024
_M_MMAP_THRESHOLD = -3  # malloc.h
# How an operator sets the same; that wins.
_OWN_SETTINGS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")


def return_large_blocks() -> bool:
    """For the whole process, from now on: a block of LARGE_BYTES or more is a mapping of its own. Costs a system call and the page
    faults for each. Returns whether it was set.
    """
    if any(name in os.environ for name in _OWN_SETTINGS):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_M_MMAP_THRESHOLD, LARGE_BYTES))
