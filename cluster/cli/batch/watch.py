"""Watches a batch of this process while it runs: for the router, which tells whoever scales, for the terminal, and for its end.

Knows when going on is pointless: no replica works, and none can come, or Ray has ended. Knows no Ray and no line.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable

from cluster.batch.errors import BatchError
from cluster.batch.records import BatchRecord
from cluster.batch.store.interface import Store
from cluster.cli.batch.progress import Display, Snapshot
from cluster.protocol.report import BatchDemand
from cluster.protocol.view import ClusterView, ReplicaState
from cluster.router.router import Router
from workers.errors import TramontaneError

LOOK_EVERY_S = 0.5
SILENCE_S = 20.0  # a dead Ray ends this process after 60, without a word to whoever waits


class Watch:
    """Tells the router, for whoever scales, what is left of the batch, and the person at the terminal. `run` as a task.

    `take` is to be told every view of the cluster. `hopeless`: why going on is pointless, once it is.
    """

    def __init__(
        self,
        store: Store,
        batch_id: str,
        *,
        has_deadline: bool,
        look_every_s: float = LOOK_EVERY_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.display: Display | None = None
        self.hopeless: asyncio.Future[TramontaneError] = asyncio.get_running_loop().create_future()
        self.is_cut_off = False
        self._store = store
        self._batch_id = batch_id
        self._has_deadline = has_deadline
        self._view: ClusterView | None = None
        self._look_every_s = look_every_s
        self._clock = clock
        self._heard = clock()

    def take(self, view: ClusterView) -> None:
        self._view, self._heard = view, self._clock()

    async def run(self, router: Router) -> None:
        self._heard = self._clock()
        while not self.hopeless.done():
            with contextlib.suppress(BatchError):  # the runner says it
                batch = await self._store.get_batch(self._batch_id)
                assert batch is not None, "a batch is not forgotten while it runs"
                self._tell(router, batch)
            self._despair(router)
            await asyncio.sleep(self._look_every_s)

    def _tell(self, router: Router, batch: BatchRecord) -> None:
        demand = BatchDemand(
            batch_id=batch.id,
            remaining_tokens=batch.remaining_tokens,
            deadline_s=max(0.0, batch.expires_at - time.time()) if self._has_deadline else None,
        )
        router.batches = (demand,) if demand.remaining_tokens and not batch.has_ended else ()
        router.batch_tokens_total = batch.answered_tokens
        if self.display is not None:
            self.display.show(snapshot_of(batch, self._view))

    def _despair(self, router: Router) -> None:
        """Where no replica works and none will come."""
        if any(replica.ready for replica in router.health().replicas):
            return
        view = self._view
        if view is not None and view.failure is not None and not num_ready(view):
            self.hopeless.set_result(BatchError(view.failure[1]))
        elif self._clock() - self._heard > SILENCE_S:
            self.is_cut_off = True
            message = f"Ray's head has not answered for {SILENCE_S:.0f} s, and no replica works any more; it has probably ended."
            self.hopeless.set_result(BatchError(message))


def snapshot_of(batch: BatchRecord, view: ClusterView | None) -> Snapshot:
    """For a display."""
    return Snapshot(
        status=batch.status,
        num_lines=batch.num_lines,
        num_completed=batch.num_completed,
        num_failed=batch.num_failed,
        num_tokens=batch.num_prompt_tokens + batch.num_output_tokens,
        share_left=batch.remaining_tokens / batch.estimated_tokens if batch.estimated_tokens else None,
        replicas=None if view is None else (num_ready(view), view.num_desired),
    )


def num_ready(view: ClusterView) -> int:
    return sum(r.state is ReplicaState.READY for r in view.replicas)
