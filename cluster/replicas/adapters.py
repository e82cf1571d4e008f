"""The adapters of one replica: loaded on all of its ranks, and remembered.

Knows the ranks. Does not decide what to load, and does not read it.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from cluster.replicas.adapter_files import AdapterContent
from cluster.replicas.gang import RankGang
from workers.errors import ReplicaUnavailableError

ASK_TIMEOUT_S = 3.0


class ReplicaAdapters:
    """`held`: the ids of the revisions that all ranks have. Methods raise what the ranks raise, as RankGang.call does."""

    def __init__(self, gang: RankGang) -> None:
        self.held: frozenset[str] = frozenset()
        self._gang = gang

    async def ask(self) -> None:
        """Learns what the ranks of a running replica hold. Raises ReplicaUnavailableError also for a frozen rank, which never answers."""
        try:
            async with asyncio.timeout(ASK_TIMEOUT_S):
                answers: list[Sequence[str]] = await self._gang.call_all("adapters")
        except TimeoutError as e:
            raise ReplicaUnavailableError(
                f"Replica {self._gang.replica_id} did not say within {ASK_TIMEOUT_S:g} s which adapters it holds."
            ) from e
        self.held = frozenset.intersection(*map(frozenset, answers))

    async def load(self, content: AdapterContent) -> None:
        """Returns when all ranks have it: requests may name it from now on."""
        await self._gang.call_all("bring_adapter", content)
        self.held |= {content.revision}

    async def unload(self, revision: str) -> None:
        """A stream that still uses it ends on it."""
        self.held -= {revision}
        await self._gang.call_all("unload_adapter", revision)


# Brings a replica all adapters that it must hold; afterwards, without another step of the event loop, nothing is missing.
BringAdapters = Callable[[ReplicaAdapters], Awaitable[None]]
