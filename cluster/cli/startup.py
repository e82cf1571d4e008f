"""What a person sees until the first replica serves: the phases of one replica, read off the controller's views.

Knows views and the console. Raises what makes waiting pointless: a failure that will repeat, or three replicas lost at their start.
"""

import asyncio
import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import workers.errors
from cluster.terminal.phases import Console, Phase
from workers.errors import ReplicaUnavailableError, TramontaneError

if TYPE_CHECKING:
    from cluster.protocol.view import ClusterView, ReplicaRecord
    from cluster.router.router import Health

MAX_LOST = 3
PHASES = {
    "placing": "Placing {n} rank(s)",
    "joining": "Joining the ranks",
    "loading": "Loading the weights",
    "starting": "Starting the engine",
}


class Startup:
    """Give every view to `take` and await `until_ready`; `end` closes the line being shown."""

    def __init__(self, console: Console, *, num_ranks: int) -> None:
        self._console = console
        self._num_ranks = num_ranks
        self._stack = contextlib.ExitStack()
        self._phase: Phase | None = None
        self._shown: tuple[str, str] | None = None  # incarnation and phase on display
        self._said: set[str] = set()
        self._lost: dict[str, str] = {}  # incarnation -> reason
        self._failure: TramontaneError | None = None
        self._over = False
        self._news = asyncio.Event()

    def take(self, view: "ClusterView") -> None:
        """One view of the cluster."""
        self._news.set()
        if self._over:
            return
        if view.failure is not None:
            name, message = view.failure
            self._failure = getattr(workers.errors, name, TramontaneError)(message)
            return
        self._lost |= {r.incarnation: r.reason or "" for r in view.replicas if r.state == "lost"}
        coming = [r for r in view.replicas if r.state in ("placing", "starting")]
        if coming and not any(r.state == "ready" for r in view.replicas):
            self._show(min(coming, key=lambda r: int(r.replica_id[1:])))

    async def until_ready(self, health: Callable[[], "Health"]) -> None:
        """Raises what the controller says will not pass, and ReplicaUnavailableError after MAX_LOST replicas died at their start."""
        while not health().ready:
            if self._failure is not None:
                raise self._failure
            if len(self._lost) >= MAX_LOST:
                raise ReplicaUnavailableError(list(self._lost.values())[-1])
            self._news.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.05):  # readiness also comes without a new view
                    await self._news.wait()

    def end(self) -> None:
        """The display is over; later views are the operator's business, not the starter's."""
        self._over = True
        self._stack.close()

    def _show(self, record: "ReplicaRecord") -> None:
        phase = record.phase or "placing"
        if (record.incarnation, phase) != self._shown:
            self._stack.close()
            self._shown = (record.incarnation, phase)
            self._phase = self._stack.enter_context(self._console.phase(PHASES[phase].format(n=self._num_ranks)))
        if phase == "loading" and self._phase is not None:
            self._phase.progress(*record.progress)
        if record.reason is not None and record.reason not in self._said:
            self._said.add(record.reason)
            self._console.line(f"\n  {record.reason}")
