"""Stores the steps of all responses that run here, in one transaction after the other: what came during one goes into the next.

So a transaction costs each token the less the more responses run. Where nobody reads along, nothing is urgent, and a quarter of a second
of steps is stored at once. If a gateway dies, the steps that were not stored are generated again: they are the same. Knows the store's
interface; not what a step means.
"""

import asyncio
import contextlib
import logging

from cluster.api.stored.run import Run
from cluster.batch.errors import StoreError
from cluster.batch.store.interface import ResponseStore

log = logging.getLogger(__name__)

QUIET_S = 0.25
NUM_TRIES = 4
RETRY_AFTER_S = 0.5


class Journal:
    """`add` a run whenever it has something new. `work` is its task."""

    def __init__(self, store: ResponseStore) -> None:
        self._store = store
        self._dirty: dict[str, Run] = {}
        self._added = asyncio.Event()
        self._urgent = asyncio.Event()
        self.num_commits = 0

    def add(self, run: Run) -> None:
        """Stores what the run has, soon."""
        self._dirty[run.id] = run
        self._added.set()
        if run.feed.num_live or run.is_finished or run.record.has_ended:
            self._urgent.set()

    def hurry(self) -> None:
        """Somebody began to read, or waits."""
        if self._dirty:
            self._urgent.set()

    async def work(self) -> None:
        """Never returns."""
        while True:
            await self._added.wait()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(QUIET_S):
                    await self._urgent.wait()
            await self.flush()

    async def flush(self) -> None:
        """Stores what there is now."""
        self._added.clear()
        self._urgent.clear()
        runs, self._dirty = self._dirty, {}
        appends = [(run, run.take()) for run in runs.values() if not run.feed.is_cut]
        if not appends:
            return
        for num_tries in range(1, NUM_TRIES + 1):
            try:
                lost = await self._store.append([append for _, append in appends])
                break
            except StoreError as e:
                if num_tries == NUM_TRIES:
                    log.error("%d responses are given up here, since they cannot be stored: %s", len(appends), e)
                    for run, _ in appends:
                        run.fail(e)
                    return
                await asyncio.sleep(RETRY_AFTER_S)
        self.num_commits += 1
        for run, append in appends:
            if run.id in lost:
                log.info("Response %s no longer runs here: it has another runner, or has ended.", run.id)
                run.lose()
            else:
                run.stored_now(append)
