"""Saves the registry of adapters of each deployment in Ray's control store, beside its spec, so that a restarted controller finds it.

Knows Ray's key-value store and the registry's JSON.
"""

import logging

import msgspec

from cluster.adapters.registry import EMPTY
from cluster.protocol.adapters import Registry
from cluster.ray_runtime.internals import KeyValueStore

log = logging.getLogger(__name__)

_STORE = KeyValueStore("tramontane-adapters")


def save_registry(deployment: str, registry: Registry) -> None:
    """Replaces the saved registry."""
    _STORE.put(deployment, msgspec.json.encode(registry))


def load_registry(deployment: str) -> Registry:
    """The registry saved last; an empty one if there is none, or none that this version can read, which the log says."""
    saved = _STORE.get(deployment)
    if saved is None:
        return EMPTY
    try:
        return msgspec.json.decode(saved, type=Registry)
    except msgspec.DecodeError as e:
        log.warning("The saved adapters of %s were written by another version and are ignored: %s", deployment, e)
        return EMPTY


def delete_registry(deployment: str) -> None:
    """For a deployment that is taken down."""
    _STORE.delete(deployment)
