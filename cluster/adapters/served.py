"""The adapters as one gateway serves them: from the name in a request to a revision, and how many requests use each revision.

Knows the registry of the newest view. A request keeps its revision from here to its last token, wherever its stream moves; the gateway
reports the counts, so that the controller unloads a revision only when nothing uses it. Knows no HTTP and no router.
"""

import asyncio
import contextlib
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator

from cluster.adapters.registry import EMPTY, find_adapter, find_revision, names_of
from cluster.protocol.adapters import Adapter, AdapterRevision, Registry, RevisionState


class ServedAdapters:
    """`update` it with every view. on_gone: called with the ids of revisions that are no longer in the registry."""

    def __init__(self, *, on_gone: Callable[[set[str]], None] = lambda _: None) -> None:
        self.registry = EMPTY
        self._streams: Counter[str] = Counter()
        self._on_gone = on_gone
        self._changed = asyncio.Event()

    def update(self, registry: Registry) -> None:
        if registry == self.registry:
            return
        gone = {r.id for r in self.registry.revisions} - {r.id for r in registry.revisions}
        self.registry = registry
        if gone:
            self._on_gone(gone)
        self._changed.set()
        self._changed = asyncio.Event()

    @property
    def names(self) -> tuple[str, ...]:
        """What requests can name: adapters with a revision that serves."""
        return tuple(adapter.name for adapter, _ in names_of(self.registry))

    def streams(self) -> dict[str, int]:
        """Requests by revision, from their admission to their end."""
        return dict(self._streams)

    def knows(self, name: str) -> bool:
        """Whether requests with this name, an adapter's or a revision's id, are served."""
        return self._serves_revision(name) or name in self.names

    def revision_of(self, name: str) -> AdapterRevision | None:
        """The current revision of an adapter, or the revision with this id, if it serves."""
        adapter = find_adapter(self.registry, name)
        return find_revision(self.registry, name if adapter is None or adapter.current is None else adapter.current)

    def adapter_of(self, name: str) -> str:
        """The adapter's name, also of the id of one of its revisions."""
        return name.partition("@")[0]

    def why_not(self, name: str) -> str | None:
        """One sentence about an adapter that is known and does not serve; None for an unknown one."""
        revisions = [r for r in self.registry.revisions if r.name == self.adapter_of(name)]
        for revision in reversed(revisions):
            if revision.state is RevisionState.LOADING:
                return f"The adapter {revision.id} is being loaded."
            if revision.state is RevisionState.FAILED:
                return f"The adapter {revision.id} could not be loaded: {revision.reason}"
        return None

    def resolve(self, name: str, request_id: str) -> str | None:
        """The revision for this request; None for any other name. Choices of one request get the same one."""
        if self._serves_revision(name):
            return name
        adapter = find_adapter(self.registry, name)
        return None if adapter is None or adapter.current is None else choose(adapter, request_id)

    def is_first_load(self, name: str) -> bool:
        """Whether it serves in a moment: its first revision is being loaded."""
        adapter = find_adapter(self.registry, name)
        loading = any(r.name == name and r.state is RevisionState.LOADING for r in self.registry.revisions)
        return adapter is not None and adapter.current is None and loading

    async def until(self, condition: Callable[[Registry], bool], *, timeout_s: float) -> None:
        """Returns when the registry is so, or after `timeout_s`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not condition(self.registry):
                    await self._changed.wait()

    @contextlib.contextmanager
    def using(self, revision_id: str) -> Iterator[None]:
        """Counts a request of this revision while the block runs. Enter it in the same step of the event loop as `resolve`."""
        self._streams[revision_id] += 1
        try:
            yield
        finally:
            self._streams[revision_id] -= 1
            if not self._streams[revision_id]:
                del self._streams[revision_id]

    def _serves_revision(self, revision_id: str) -> bool:
        revision: AdapterRevision | None = find_revision(self.registry, revision_id)
        return revision is not None and revision.state is RevisionState.READY


def choose(adapter: Adapter, request_id: str) -> str:
    """The canary for its share of all request ids, otherwise the current revision. The same id always gets the same one.

    A larger share keeps every request id that a smaller one had.
    """
    assert adapter.current is not None, "an adapter without a revision has no requests"
    if adapter.canary is None:
        return adapter.current
    digest = hashlib.blake2b(request_id.encode(), digest_size=8, person=b"canary").digest()
    return adapter.canary if int.from_bytes(digest, "big") < adapter.canary_share * 2**64 else adapter.current
