"""Keeps the replicas' adapters as the registry says, and the registry as requests and events change it.

Every replica that serves holds every revision that is not gone. A revision serves only once all of them hold it, and it leaves only when
no gateway has a request on it. Every new registry is saved before anybody sees it, so a restarted controller goes on from there. Knows no
Ray and no HTTP; decides with the pure functions of cluster/adapters/registry.py.
"""

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Protocol

from cluster.adapters import registry as transitions
from cluster.adapters.registry import EMPTY, find_revision, in_state, wanted
from cluster.adapters.store import AdapterStore
from cluster.protocol.adapters import AdapterRevision, Registry, RevisionState
from cluster.replicas.adapter_files import AdapterContent
from workers.errors import (
    CheckpointError,
    ConfigError,
    ReplicaUnavailableError,
    RequestError,
)

log = logging.getLogger(__name__)

TICK_S = 0.25
LOAD_TIMEOUT_S = 300.0  # of one load on all replicas, while there are some
RETRY_S = 1.0  # after a load on a replica that failed for another reason than the adapter


class AdapterHolder(Protocol):
    """One replica's adapters; see ReplicaAdapters."""

    @property
    def held(self) -> frozenset[str]: ...

    async def load(self, content: AdapterContent) -> None: ...
    async def unload(self, revision: str) -> None: ...


class AdapterKeeper:
    """`await run()` in a task until cancelled. All on one event loop.

    serving: the adapters of the replicas that serve now, by a key that no other start of a replica has. save: keeps a registry; blocking.
    on_change: called when `registry` has changed. num_streams: the requests that gateways have on a revision; None while some gateway may
    not know yet that it retires. may_serve_alone: whether a revision may serve before any replica holds it. content: what ranks need of a
    revision.
    """

    def __init__(
        self,
        store: AdapterStore,
        registry: Registry = EMPTY,
        *,
        serving: Callable[[], Mapping[object, AdapterHolder]],
        save: Callable[[Registry], None],
        on_change: Callable[[], None],
        num_streams: Callable[[str], int | None],
        may_serve_alone: Callable[[], bool],
        content: Callable[[AdapterRevision, AdapterStore], Awaitable[AdapterContent]],
    ) -> None:
        self.registry = registry
        self.store = store
        self._serving = serving
        self._save = save
        self._on_change = on_change
        self._num_streams = num_streams
        self._may_serve_alone = may_serve_alone
        self._content = content
        self._lock = asyncio.Lock()
        self._woken = asyncio.Event()
        self._changed = asyncio.Event()
        self._arriving: Counter[str] = Counter()  # digests of contents that no revision has yet
        self._give_up_at: dict[str, float] = {}  # of revisions that are loading, by time.monotonic()
        self._bringing: dict[object, asyncio.Task[None]] = {}
        self._not_before: dict[object, float] = {}

    # What the API asks for.

    async def load(
        self,
        revision: AdapterRevision,
        files: Mapping[str, bytes] | None = None,
        *,
        in_place: bool,
        again: bool = False,
    ) -> Registry | None:
        """Returns when the revision serves; None if its content is not here, and must come along as `files`.

        again: the caller has asked before, and a controller that has died may have done it. Raises RequestError for what is refused, and
        CheckpointError if a replica cannot load it; what served before still serves then.
        """
        if again and self._is_done(revision):
            return self.registry
        self._arriving[revision.digest] += 1
        try:
            if not await asyncio.to_thread(self._take_content, revision.digest, files):
                return None
            if not (again and self._is_loading(revision)):
                await self._commit(lambda now: transitions.begin(now, revision, in_place=in_place))
        finally:
            self._arriving[revision.digest] -= 1
        await self._until_loaded(revision)
        return self.registry

    async def _until_loaded(self, revision: AdapterRevision) -> None:
        while self._is_loading(revision):
            await self._changed.wait()
        known = find_revision(self.registry, revision.id)
        if known is not None and known.state is RevisionState.FAILED:
            raise CheckpointError(f"Loading lora {revision.name} failed: {known.reason}")
        if known is None or known.state is RevisionState.RETIRING:
            raise RequestError(f"The adapter {revision.name!r} was unloaded while it was being loaded.")

    async def promote(self, name: str) -> Registry:
        return await self._commit(lambda now: transitions.promote(now, name))

    async def rollback(self, name: str) -> Registry:
        return await self._commit(lambda now: transitions.rollback(now, name))

    async def unload(self, name: str) -> Registry:
        return await self._commit(lambda now: transitions.unload(now, name))

    # What replicas and the controller ask for.

    def wake(self) -> None:
        """Runs the next round now."""
        self._woken.set()

    async def bring(self, holder: AdapterHolder) -> None:
        """For a replica that starts: returns when it holds all that it must, until the event loop's next step.

        An adapter that it cannot load, and that no replica serves, is given up. Raises CheckpointError for any other.
        """
        while missing := [r for r in wanted(self.registry) if r.id not in holder.held]:
            for revision in missing:
                if find_revision(self.registry, revision.id) is None:
                    continue
                try:
                    await holder.load(await self._content(revision, self.store))
                except (CheckpointError, ConfigError) as e:
                    if any(revision.id in other.held for other in self._serving().values()):
                        raise
                    log.error("The adapter %s cannot be loaded and is given up: %s", revision.id, e)
                    await self._commit(partial(transitions.failed, revision_id=revision.id, reason=str(e)))

    async def run(self) -> None:
        await asyncio.to_thread(self._open_store)
        while True:
            self._woken.clear()
            try:
                await self._round()
            except ReplicaUnavailableError as e:
                log.debug("A round of adapters ended early: %s", e)
            except Exception as e:  # an error of one adapter must not end the care for all
                log.exception("A round of adapters failed: %s", e)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TICK_S):
                    await self._woken.wait()

    async def end(self) -> None:
        """The deployment is taken down: removes all contents."""
        tasks, self._bringing = list(self._bringing.values()), {}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.registry = EMPTY
        await self._forget_contents()

    def _open_store(self) -> None:
        """Holds what the registry needs, and removes what a killed server left."""
        for revision in wanted(self.registry):
            self.store.has(revision.digest)
        self.store.sweep()

    async def _round(self) -> None:
        serving = dict(self._serving())
        self._bring_all(serving)
        now, loading = time.monotonic(), in_state(self.registry, RevisionState.LOADING)
        latest = now + LOAD_TIMEOUT_S
        # A replica that is the first to start takes the time that it takes.
        self._give_up_at = {r.id: self._give_up_at.get(r.id, latest) if serving else latest for r in loading}
        for revision in loading:
            if self._is_everywhere(revision.id):
                await self._commit(partial(self._loaded, revision_id=revision.id))
            elif now > self._give_up_at[revision.id]:
                reason = f"Not all replicas loaded it within {LOAD_TIMEOUT_S:.0f} s."
                await self._commit(partial(transitions.failed, revision_id=revision.id, reason=reason))
        for revision in in_state(self.registry, RevisionState.RETIRING):
            if self._num_streams(revision.id) == 0:
                await self._commit(partial(transitions.drained, revision_id=revision.id))
                log.info("The adapter %s is gone.", revision.id)
        await self._forget_contents()

    def _bring_all(self, serving: Mapping[object, AdapterHolder]) -> None:
        """One task for each replica that lacks a revision or holds too many."""
        needed = {r.id for r in wanted(self.registry)}
        self._bringing = {key: task for key, task in self._bringing.items() if not task.done()}
        now = time.monotonic()
        for key, holder in serving.items():
            if holder.held != needed and key not in self._bringing and now >= self._not_before.get(key, 0.0):
                self._bringing[key] = asyncio.create_task(self._bring_one(key, holder), name=f"adapters-{key}")
        self._not_before = {key: at for key, at in self._not_before.items() if key in serving and at > now}

    async def _bring_one(self, key: object, holder: AdapterHolder) -> None:
        """Loads what is missing on a replica that serves, and unloads what is gone."""
        try:
            for revision in wanted(self.registry):
                if revision.id not in holder.held:
                    await self._load_on(key, holder, revision)
            for revision_id in holder.held - {r.id for r in wanted(self.registry)}:
                await holder.unload(revision_id)
        except ReplicaUnavailableError as e:  # its end is noticed elsewhere
            log.debug("%s", e)
        except Exception as e:
            log.warning("The adapters of replica %s could not be brought up to date and are tried again: %s", key, e)
            self._not_before[key] = time.monotonic() + RETRY_S
        finally:
            self.wake()

    async def _load_on(self, key: object, holder: AdapterHolder, revision: AdapterRevision) -> None:
        try:
            await holder.load(await self._content(revision, self.store))
        except (CheckpointError, ConfigError) as e:
            now = find_revision(self.registry, revision.id)
            if now is None or now.state is not RevisionState.LOADING:
                raise
            log.error("The adapter %s cannot be loaded on replica %s and is given up: %s", revision.id, key, e)
            await self._commit(partial(transitions.failed, revision_id=revision.id, reason=str(e)))

    def _loaded(self, registry: Registry, *, revision_id: str) -> Registry:
        """Looks again: a replica may have become ready while the registry was locked."""
        if not self._is_everywhere(revision_id):
            return registry
        log.info("The adapter %s is loaded on all replicas.", revision_id)
        return transitions.loaded(registry, revision_id, now=time.time())

    def _is_everywhere(self, revision_id: str) -> bool:
        holders = list(self._serving().values())
        return all(revision_id in h.held for h in holders) if holders else self._may_serve_alone()

    def _is_loading(self, revision: AdapterRevision) -> bool:
        known = find_revision(self.registry, revision.id)
        return known is not None and known.state is RevisionState.LOADING

    def _is_done(self, revision: AdapterRevision) -> bool:
        adapter = transitions.find_adapter(self.registry, revision.name)
        return adapter is not None and revision.id == (adapter.current if revision.share is None else adapter.canary)

    async def _commit(self, transition: Callable[[Registry], Registry]) -> Registry:
        """Saves what the transition makes of the registry, then lets everybody see it. Raises what the transition raises."""
        async with self._lock:
            new = transition(self.registry)
            if new != self.registry:
                await asyncio.to_thread(self._save, new)
                # Saving takes a moment, in which a replica cannot have become ready without what the registry said before.
                self.registry = new
                self._on_change()
                self._changed.set()
                self._changed = asyncio.Event()
                self.wake()
        return self.registry

    def _take_content(self, digest: str, files: Mapping[str, bytes] | None) -> bool:
        """Whether the store holds it now. Raises ConfigError."""
        if files is not None:
            self.store.write(files, digest)
        return self.store.has(digest)

    def _needs(self, digest: str) -> bool:
        return self._arriving[digest] > 0 or any(r.digest == digest for r in wanted(self.registry))

    async def _forget_contents(self) -> None:
        """Removes the folders of contents that are gone."""
        if any(not self._needs(digest) for digest in self.store.held):
            await asyncio.to_thread(self._remove_contents)

    def _remove_contents(self) -> None:
        for digest in self.store.held:
            if not self._needs(digest):
                self.store.remove(digest)
