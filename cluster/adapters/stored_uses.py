"""Which retiring revisions stored responses still name, also those of a gateway that has died: another one goes on with them.

Such a revision counts as in use at every gateway that can reach the store, so that it is there when one of them takes the response over.
Knows the registry and a question to the store; nothing of responses.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection

from cluster.adapters.registry import in_state
from cluster.adapters.served import ServedAdapters
from cluster.protocol.adapters import RevisionState
from workers.errors import TramontaneError

log = logging.getLogger(__name__)

ASK_EVERY_S = 0.5
IDLE_S = 60.0  # looks again that often, whether or not the registry has changed


class StoredUses:
    """`await watch(ask)` in a task; without it, the counts are those of this gateway's requests alone.

    ask: the revisions that responses which have not ended name. May raise TramontaneError.
    """

    def __init__(self, served: ServedAdapters) -> None:
        self._served = served
        self._is_watching = False
        self._free: set[str] = set()  # retiring ones that the store does not name

    def streams(self) -> dict[str, int]:
        """Requests by revision. A retiring revision has one more until the store was asked, and while it names it."""
        found = self._served.streams()
        retiring = self._retiring()
        self._free &= retiring
        if self._is_watching:
            for revision in retiring - self._free:
                found[revision] = found.get(revision, 0) + 1
        return found

    def watch(self, ask: Callable[[], Awaitable[Collection[str]]]) -> asyncio.Task[None]:
        """Retiring revisions are held from now on. The task never ends by itself."""
        self._is_watching = True
        return asyncio.create_task(self._watch(ask), name="adapters of stored responses")

    async def _watch(self, ask: Callable[[], Awaitable[Collection[str]]]) -> None:
        while True:
            await self._served.until(lambda _: bool(self._retiring()), timeout_s=IDLE_S)
            if retiring := self._retiring():
                try:
                    self._free = retiring - set(await ask())
                except TramontaneError as e:
                    log.warning("The adapters of stored responses cannot be read now, and are kept: %s", e)
                await asyncio.sleep(ASK_EVERY_S)

    def _retiring(self) -> set[str]:
        return {r.id for r in in_state(self._served.registry, RevisionState.RETIRING)}
