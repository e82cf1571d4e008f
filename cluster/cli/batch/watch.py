"""Watches a batch while this process runs it: for the router, which reports the demand to the autoscaler, and for the terminal.

Also notices when continuing is pointless: no replica works and none can start, or Ray has ended. Knows no Ray and no line.
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

POLL_EVERY_S = 0.5
SILENCE_S = 20.0  # when Ray is dead it ends this process after 60 s, without a message


class Watch:
    """Reports what is left of the batch to the router and the display. Start `run` as a task, and pass it every view with `on_view`.

    `failed`: resolves to the reason when continuing is pointless.
    """

    def __init__(
        self,
        store: Store,
        batch_id: str,
        *,
        has_deadline: bool,
        poll_every_s: float = POLL_EVERY_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.display: Display | None = None
        self.failed: asyncio.Future[TramontaneError] = asyncio.get_running_loop().create_future()
        self.ray_is_gone = False
        self._store = store
        self._batch_id = batch_id
        self._has_deadline = has_deadline
        self._view: ClusterView | None = None
        self._poll_every_s = poll_every_s
        self._clock = clock
        self._heard_at = clock()

    def on_view(self, view: ClusterView) -> None:
        self._view, self._heard_at = view, self._clock()

    async def run(self, router: Router) -> None:
        self._heard_at = self._clock()
        while not self.failed.done():
            with contextlib.suppress(BatchError):  # the runner reports it
                batch = await self._store.get_batch(self._batch_id)
                assert batch is not None, "the batch is in the store while it runs"
                self._report(router, batch)
            self._check(router)
            await asyncio.sleep(self._poll_every_s)

    def _report(self, router: Router, batch: BatchRecord) -> None:
        demand = BatchDemand(
            batch_id=batch.id,
            remaining_tokens=batch.remaining_tokens,
            deadline_s=max(0.0, batch.expires_at - time.time()) if self._has_deadline else None,
        )
        router.batches = (demand,) if demand.remaining_tokens and not batch.has_ended else ()
        router.batch_tokens_total = batch.answered_tokens
        if self.display is not None:
            self.display.show(snapshot_of(batch, self._view))

    def _check(self, router: Router) -> None:
        """Fails if no replica works and none will start."""
        if any(replica.ready for replica in router.health().replicas):
            return
        view = self._view
        if view is not None and view.failure is not None and not num_ready(view):
            self.failed.set_result(BatchError(view.failure.message, remedy=view.failure.remedy))
        elif self._clock() - self._heard_at > SILENCE_S:
            self.ray_is_gone = True
            message = (
                f"Ray's head has not answered for {SILENCE_S:.0f} s and no replica works, so Ray has probably ended."
            )
            self.failed.set_result(BatchError(message))


def snapshot_of(batch: BatchRecord, view: ClusterView | None) -> Snapshot:
    """What a display shows. view: None if unknown."""
    return Snapshot(
        status=batch.status,
        num_lines=batch.num_lines,
        num_completed=batch.num_completed,
        num_failed=batch.num_failed,
        num_tokens=batch.num_prompt_tokens + batch.num_output_tokens,
        remaining=batch.remaining_tokens / batch.estimated_tokens if batch.estimated_tokens else None,
        replicas=None if view is None else (num_ready(view), view.num_desired),
    )


def num_ready(view: ClusterView) -> int:
    return sum(r.state is ReplicaState.READY for r in view.replicas)
