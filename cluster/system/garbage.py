"""How often Python looks for objects that refer to each other in circles. Knows Python's collector, and no object.

A full search passes over all that was imported, half a million objects, and stops the event loop for a tenth of a second. With 64 streams
the searches were 7 % of a gateway's CPU time.
"""

import gc

# Of objects made and not freed since the last search; Python's own is 700. A request makes a few hundred.
NEW_OBJECTS = 10_000


def search_rarely() -> None:
    """For the whole process, once it has started: what exists now is never searched again, and the rest less often."""
    gc.freeze()
    gc.set_threshold(NEW_OBJECTS, *gc.get_threshold()[1:])
