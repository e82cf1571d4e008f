"""The newest wish of each deployment, kept in Ray's own control store, where a controller that is started again finds it.

Ray starts a dead actor with the arguments it was made with: the first wish it ever had. Knows Ray's key-value store and pickling.
"""

import logging
import pickle

from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_put

from cluster.protocol.spec import ClusterSpec

log = logging.getLogger(__name__)

_NAMESPACE = b"tramontane-wishes"


def keep_wish(deployment: str, spec: ClusterSpec) -> None:
    """Replaces what was kept."""
    _internal_kv_put(deployment.encode(), pickle.dumps(spec), overwrite=True, namespace=_NAMESPACE)


def find_wish(deployment: str) -> ClusterSpec | None:
    """What was kept last; None when there is nothing, or nothing that this version can read."""
    kept = _internal_kv_get(deployment.encode(), namespace=_NAMESPACE)
    if kept is None:
        return None
    try:
        spec = pickle.loads(kept)
    except Exception as e:  # another version's classes: unpickling raises whatever it likes
        log.warning("The wish kept for %s cannot be read and is left out: %r", deployment, e)
        return None
    return spec if isinstance(spec, ClusterSpec) else None


def forget_wish(deployment: str) -> None:
    """For a deployment that is taken down."""
    _internal_kv_del(deployment.encode(), namespace=_NAMESPACE)
