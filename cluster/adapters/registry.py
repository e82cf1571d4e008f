"""The transitions of the registry: pure functions from one frozen value to the next.

A name's revisions move like this; each arrow is one function:

    begin -> LOADING -> loaded -> READY (current, or canary with a share) -> promote, rollback, unload -> RETIRING -> drained -> gone
                     -> failed -> FAILED

Knows no replica, no file and no clock. What a function refuses, it refuses with RequestError, in words for the caller of the API.
"""

import re
from collections.abc import Iterator
from dataclasses import replace

from cluster.protocol.adapters import NO_REGISTRY, Adapter, AdapterRevision, Registry, RevisionState
from workers.errors import RequestError

EMPTY = NO_REGISTRY
ALREADY_LOADED = "lora_already_loaded"
NOT_FOUND = "lora_not_found"
# No "@", which separates a name from its digest.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}")
_LOADED = (RevisionState.LOADING, RevisionState.READY, RevisionState.RETIRING)


def find_adapter(registry: Registry, name: str) -> Adapter | None:
    return next((a for a in registry.adapters if a.name == name), None)


def find_revision(registry: Registry, revision_id: str) -> AdapterRevision | None:
    return next((r for r in registry.revisions if r.id == revision_id), None)


def wanted(registry: Registry) -> tuple[AdapterRevision, ...]:
    """What every replica must hold, also one that starts now."""
    return tuple(r for r in registry.revisions if r.state in _LOADED)


def in_state(registry: Registry, state: RevisionState) -> tuple[AdapterRevision, ...]:
    return tuple(r for r in registry.revisions if r.state is state)


def check_name(name: str) -> None:
    """Raises RequestError for what cannot be an adapter's name."""
    if not _NAME.fullmatch(name):
        raise RequestError(
            f"{name[:140]!r} cannot be the name of an adapter.",
            remedy="Use at most 128 letters, digits and . _ : / -, the first a letter or digit.",
            param="lora_name",
        )


def begin(registry: Registry, revision: AdapterRevision, *, in_place: bool = False) -> Registry:
    """A load begins. The revision's `share` says what it will be.

    in_place: it may replace the current revision of its name; a canary replaces nothing. The content that the name has already is no
    second load: as a canary it changes its share, and in place nothing happens.
    """
    check_name(revision.name)
    adapter = find_adapter(registry, revision.name)
    known = find_revision(registry, revision.id)
    _check_not_loading(registry, revision.name)
    if adapter is None or adapter.current is None:
        if revision.share is not None:
            raise RequestError(
                f"The adapter {revision.name!r} has no revision yet that a canary could be compared with.",
                remedy="Load it without a canary first.",
                param="canary",
            )
        return _with_revision(_with_adapter(registry, Adapter(name=revision.name)), revision)
    if revision.share is not None:
        return _begin_canary(registry, adapter, revision)
    if not in_place:
        raise RequestError(
            f"The lora adapter {revision.name!r} has already been loaded. If you want to load the adapter in place, set "
            "'load_inplace' to True.",
            code=ALREADY_LOADED,
        )
    if adapter.canary is not None:
        raise RequestError(
            f"The adapter {revision.name!r} has a canary, {adapter.canary}.",
            remedy="Promote it or roll it back first.",
        )
    if revision.id == adapter.current:
        return registry
    return _with_revision(registry, revision if known is None else replace(revision, loaded_at=known.loaded_at))


def _begin_canary(registry: Registry, adapter: Adapter, revision: AdapterRevision) -> Registry:
    assert revision.share is not None
    if revision.id == adapter.canary:
        return _with_adapter(registry, replace(adapter, canary_share=revision.share))
    if adapter.canary is not None:
        raise RequestError(
            f"The adapter {adapter.name!r} has another canary, {adapter.canary}.",
            remedy="Promote it or roll it back first.",
            param="canary",
        )
    if revision.id == adapter.current:
        raise RequestError(
            f"The canary of {adapter.name!r} has the same content as its current revision, {revision.id}.",
            remedy="Load the content that is to be tried.",
            param="canary",
        )
    return _with_revision(registry, revision)


def loaded(registry: Registry, revision_id: str, *, now: float) -> Registry:
    """All replicas hold it: it serves, as current revision or as canary. now: time.time()."""
    revision = find_revision(registry, revision_id)
    if revision is None or revision.state is not RevisionState.LOADING:
        return registry
    adapter = find_adapter(registry, revision.name)
    assert adapter is not None, f"{revision_id} has no adapter"
    registry = _with_revision(registry, replace(revision, state=RevisionState.READY, share=None, loaded_at=now))
    if revision.share is not None:
        # It may be the content of before, which is no longer there to return to then.
        previous = None if adapter.previous == revision_id else adapter.previous
        canary = replace(adapter, canary=revision_id, canary_share=revision.share, previous=previous)
        return _with_adapter(registry, canary)
    return _replace_current(registry, adapter, revision_id)


def failed(registry: Registry, revision_id: str, reason: str) -> Registry:
    """It cannot be loaded: it is dropped everywhere, and what served before still serves."""
    revision = find_revision(registry, revision_id)
    if revision is None:
        return registry
    registry = _with_revision(registry, replace(revision, state=RevisionState.FAILED, share=None, reason=reason))
    for adapter in registry.adapters:
        registry = _with_adapter(
            registry,
            replace(
                adapter,
                current=_other(adapter.current, revision_id),
                canary=_other(adapter.canary, revision_id),
                previous=_other(adapter.previous, revision_id),
            ),
        )
    return registry


def promote(registry: Registry, name: str) -> Registry:
    """The canary becomes the current revision, for all new requests."""
    adapter = _settled(registry, name)
    if adapter.canary is None:
        raise RequestError(
            f"The adapter {name!r} has no canary to promote.", remedy="Load one with 'canary' first.", param="name"
        )
    return _replace_current(registry, replace(adapter, canary=None, canary_share=0.0), adapter.canary)


def rollback(registry: Registry, name: str) -> Registry:
    """Ends the canary; without one, the revision before the current one serves again."""
    adapter = _settled(registry, name)
    if adapter.canary is not None:
        return _retire(_with_adapter(registry, replace(adapter, canary=None, canary_share=0.0)), adapter.canary)
    if adapter.previous is None:
        raise RequestError(
            f"The adapter {name!r} has neither a canary nor a revision before its current one.",
            remedy="Load the content that you want.",
            param="name",
        )
    assert adapter.current is not None
    registry = _with_adapter(registry, replace(adapter, current=adapter.previous, previous=None))
    return _retire(registry, adapter.current)


def unload(registry: Registry, name: str) -> Registry:
    """The name is gone for new requests at once; its revisions leave when their streams have ended."""
    _known(registry, name)
    revisions = tuple(r for r in registry.revisions if r.name != name or r.state is not RevisionState.FAILED)
    registry = Registry(adapters=tuple(a for a in registry.adapters if a.name != name), revisions=revisions)
    for revision in revisions:
        if revision.name == name:
            registry = _retire(registry, revision.id)
    return registry


def drained(registry: Registry, revision_id: str) -> Registry:
    """No gateway has a stream on this RETIRING revision."""
    revision = find_revision(registry, revision_id)
    if revision is None or revision.state is not RevisionState.RETIRING:
        return registry
    return replace(registry, revisions=tuple(r for r in registry.revisions if r.id != revision_id))


def names_of(registry: Registry) -> Iterator[tuple[Adapter, AdapterRevision]]:
    """The names that serve, each with its current revision."""
    for adapter in registry.adapters:
        if adapter.current is not None and (revision := find_revision(registry, adapter.current)) is not None:
            yield adapter, revision


def _other(role: str | None, revision_id: str) -> str | None:
    return None if role == revision_id else role


def _settled(registry: Registry, name: str) -> Adapter:
    adapter = _known(registry, name)
    _check_not_loading(registry, name)
    return adapter


def _check_not_loading(registry: Registry, name: str) -> None:
    if any(r.name == name and r.state is RevisionState.LOADING for r in registry.revisions):
        raise RequestError(
            f"The adapter {name!r} is being loaded already.", remedy="Try again when that load has ended."
        )


def _known(registry: Registry, name: str) -> Adapter:
    adapter = find_adapter(registry, name)
    if adapter is None:
        names = ", ".join(repr(a.name) for a in registry.adapters) or "none"
        raise RequestError(
            f"The lora adapter {name!r} cannot be found.",
            remedy=f"The adapters are: {names}.",
            param="lora_name",
            code=NOT_FOUND,
        )
    return adapter


def _replace_current(registry: Registry, adapter: Adapter, revision_id: str) -> Registry:
    """The current revision becomes the previous one, and the one before that retires."""
    registry = _with_adapter(registry, replace(adapter, current=revision_id, previous=adapter.current))
    if adapter.previous is not None and adapter.previous != revision_id:
        registry = _retire(registry, adapter.previous)
    return registry


def _retire(registry: Registry, revision_id: str) -> Registry:
    revision = find_revision(registry, revision_id)
    if revision is None or revision.state not in _LOADED:
        return registry
    return _with_revision(registry, replace(revision, state=RevisionState.RETIRING, share=None))


def _with_adapter(registry: Registry, adapter: Adapter) -> Registry:
    """In the place of the adapter of this name, or as a new one."""
    if find_adapter(registry, adapter.name) is None:
        return replace(registry, adapters=(*registry.adapters, adapter))
    return replace(registry, adapters=tuple(adapter if a.name == adapter.name else a for a in registry.adapters))


def _with_revision(registry: Registry, revision: AdapterRevision) -> Registry:
    """In the place of the revision of this id, or as a new one, which also ends the record of the name's failed ones."""
    kept = tuple(
        r
        for r in registry.revisions
        if r.id == revision.id or r.name != revision.name or r.state is not RevisionState.FAILED
    )
    if any(r.id == revision.id for r in kept):
        return replace(registry, revisions=tuple(revision if r.id == revision.id else r for r in kept))
    return replace(registry, revisions=(*kept, revision))
