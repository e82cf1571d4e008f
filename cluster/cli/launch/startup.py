"""What a person sees until the first replica serves: the phases of one replica, taken from the controller's views.

Knows views and the console. Raises an error when waiting is useless: a failure that would repeat, or three replicas lost while starting.
"""

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from cluster.system.tasks import cancel_all
from cluster.terminal.phases import Console, Phase
from workers.errors import CheckpointError, ConfigError, ReplicaUnavailableError, TramontaneError

if TYPE_CHECKING:
    from cluster.protocol.view import ClusterView, ReplicaRecord
    from cluster.router.router import Health

MAX_LOST = 3
# By the kind of a StartFailure.
FAILURES: dict[str, type[TramontaneError]] = {
    "config": ConfigError,
    "checkpoint": CheckpointError,
    "stopping": ReplicaUnavailableError,
}
PHASES = {
    "placing": "Placing {ranks}",
    "joining": "Joining the ranks",
    "loading": "Loading the weights",
    "starting": "Starting the engine",
}


class Startup:
    """Pass every view to `handle` and await `until_ready`. `end` closes the phase that is shown.

    title: the model's name, where several start. after: the starts whose phases are shown first.
    """

    def __init__(
        self, console: Console, *, num_ranks: int, title: str | None = None, after: Sequence["Startup"] = ()
    ) -> None:
        self._console = console
        self._title = "" if title is None else f"{title}: "
        self._after = tuple(after)
        self._ranks = f"{num_ranks} rank{'s' * (num_ranks != 1)}"
        self._stack = contextlib.ExitStack()
        self._phase: Phase | None = None
        self._shown: tuple[str, str] | None = None  # incarnation and phase of what is shown
        self._said: set[str] = set()
        self._lost: dict[str, str] = {}  # incarnation -> reason
        self._failure: TramontaneError | None = None
        self._over = False
        self._has_news = asyncio.Event()

    def handle(self, view: "ClusterView") -> None:
        """One view of the cluster."""
        self._has_news.set()
        if self._over:
            return
        if view.failure is not None:
            self._failure = FAILURES[view.failure.kind](view.failure.message, remedy=view.failure.remedy)
            return
        self._lost |= {r.incarnation: r.reason or "" for r in view.replicas if r.state == "lost"}
        coming = [r for r in view.replicas if r.state in ("placing", "starting")]
        is_its_turn = all(startup.is_over for startup in self._after)
        if is_its_turn and coming and not any(r.state == "ready" for r in view.replicas):
            self._show(min(coming, key=lambda r: (len(r.replica_id), r.replica_id)))

    @property
    def is_over(self) -> bool:
        return self._over

    async def until_ready(self, health: Callable[[], "Health"]) -> None:
        """Raises the controller's failure, if any, and ReplicaUnavailableError after MAX_LOST replicas were lost while starting."""
        while not health().ready:
            if self._failure is not None:
                raise self._failure
            if len(self._lost) >= MAX_LOST:
                raise ReplicaUnavailableError(list(self._lost.values())[-1])
            self._has_news.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.05):  # readiness also comes without a new view
                    await self._has_news.wait()

    def end(self) -> None:
        """Shows nothing from now on; later views concern the operator, not the start."""
        self._over = True
        self._stack.close()

    def _show(self, record: "ReplicaRecord") -> None:
        phase = record.phase or "placing"
        if (record.incarnation, phase) != self._shown:
            self._stack.close()
            self._shown = (record.incarnation, phase)
            name = self._title + PHASES[phase].format(ranks=self._ranks)
            self._phase = self._stack.enter_context(self._console.phase(name))
        if phase == "loading" and self._phase is not None:
            self._phase.progress(*record.progress)
        if record.reason is not None and record.reason not in self._said:
            self._said.add(record.reason)
            self._console.line(f"  {self._title}{record.reason}")


async def all_ready(starts: Sequence[tuple[Startup, Callable[[], "Health"]]]) -> None:
    """Returns when every deployment serves. Raises the first failure, as `until_ready`."""

    async def one(startup: Startup, health: Callable[[], "Health"]) -> None:
        await startup.until_ready(health)
        startup.end()

    tasks = [asyncio.create_task(one(*start)) for start in starts]
    try:
        await asyncio.gather(*tasks)
    finally:
        await cancel_all(*tasks)
