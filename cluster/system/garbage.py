"""How often Python's cyclic garbage collector runs. Knows no object of ours.

A full collection visits every object of every imported module, and the event loop waits for it. With 64 streams, collections were 7 % of
the samples in a profile of the gateway.
"""

import gc

# Objects made and not freed since the last collection; Python's own threshold is 700.
NEW_OBJECTS = 10_000


def collect_garbage_rarely() -> None:
    """Call this once the process has started: what exists now is never visited again, and collections become rarer."""
    gc.freeze()
    gc.set_threshold(NEW_OBJECTS, *gc.get_threshold()[1:])
