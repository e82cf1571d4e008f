"""How many compiled products torch keeps on the CPU: oneDNN makes one for each shape it meets, and torch remembers it once more.

A step has another number of rows than the one before, so a rank meets some thousand shapes. By default both caches keep 1,024 products,
110 MiB. Both read the environment when torch is loaded. Knows no torch.
"""

from collections.abc import MutableMapping

NUM_PRIMITIVES = 64  # those of about 12 different steps
VARIABLES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")


def bound_primitive_caches(environ: MutableMapping[str, str]) -> None:
    """Call it before torch is imported. What an operator has set stays."""
    for name in VARIABLES:
        environ.setdefault(name, str(NUM_PRIMITIVES))
