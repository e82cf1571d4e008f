"""How often Python looks for objects that refer to each other in circles. Knows Python's collector, and no object.

A full search passes over all that was imported, and the event loop waits for it. With 64 streams the searches were 7 % of the samples of a
gateway's profile.
"""

import gc

# Of objects made and not freed since the last search; Python's own is 700.
NEW_OBJECTS = 10_000


def search_rarely() -> None:
    """For the whole process, once it has started: what exists now is never searched again, and the rest less often."""
    gc.freeze()
    gc.set_threshold(NEW_OBJECTS, *gc.get_threshold()[1:])
