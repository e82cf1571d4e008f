"""Asks the Linux kernel for AMX's tiles. A process that uses them without asking is ended by a signal.

Source: the kernel's documentation, arch/x86/xstate.rst, "Using dynamically enabled XSTATE features in user space applications".
"""

import ctypes

AMX_FLAGS = frozenset({"amx_tile", "amx_bf16", "amx_int8"})
_SYS_ARCH_PRCTL = 158
_ARCH_REQ_XCOMP_PERM = 0x1023
_XFEATURE_XTILEDATA = 18


def request_tiles() -> bool:
    """Whether this process and its children may use tiles from now on. False: a CPU without them, a kernel before 5.16, or a sandbox."""
    libc = ctypes.CDLL(None, use_errno=True)
    return libc.syscall(_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA) == 0
