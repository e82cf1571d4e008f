"""Runs every batch of a store, a few at a time, while a server lives. Takes over batches of dead runners and removes expired files.

Several services may share a store; each batch runs in one of them at a time. Code that creates or cancels a batch may call `wake`.
"""

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass

from cluster.batch.errors import BatchError, LeaseLostError, StoreError
from cluster.batch.files import FileContents
from cluster.batch.records import BatchRecord, Lease
from cluster.batch.run.executor import LineExecutor
from cluster.batch.run.runner import BatchRunner, RunnerOptions
from cluster.batch.run.suspects import Trials
from cluster.batch.store.interface import Store
from cluster.system.process import is_dead, new_owner

log = logging.getLogger(__name__)

SWEEP_EVERY_S = 600.0


@dataclass(frozen=True, kw_only=True)
class ServiceOptions:
    """poll_every_s: how soon batches created by other processes are seen. retry_after_s: the pause after the store failed."""

    max_batches: int = 4
    poll_every_s: float = 2.0
    retry_after_s: float = 5.0


class BatchService:
    """Start `run` as a task; cancel the task to stop it."""

    def __init__(
        self,
        store: Store,
        files: FileContents,
        executor: LineExecutor,
        *,
        options: RunnerOptions | None = None,
        service: ServiceOptions | None = None,
    ) -> None:
        self._store = store
        self._files = files
        self._executor = executor
        self._options = options or RunnerOptions()
        self._service = service or ServiceOptions()
        self._trials = Trials()
        self._owner = new_owner()
        self._running: dict[asyncio.Task[None], BatchRunner] = {}
        self._wake = asyncio.Event()
        self._not_before = 0.0
        self._swept_at = -float("inf")

    @property
    def batch_ids(self) -> set[str]:
        """The batches that this service is running now."""
        return {task.get_name() for task in self._running}

    def wake(self) -> None:
        """Polls the store now: a batch was created or cancelled."""
        self._wake.set()
        for runner in self._running.values():
            runner.wake()

    async def run(self) -> None:
        """Retries a store that fails, and logs it. When cancelled, releases its batches, so that other services may run them."""
        try:
            while True:
                self._wake.clear()
                await self._poll()
                with contextlib.suppress(TimeoutError):  # not wait_for, which may swallow a cancellation on Python 3.11
                    async with asyncio.timeout(self._service.poll_every_s):
                        await self._wake.wait()
        finally:
            for task in self._running:
                task.cancel()
            await asyncio.gather(*self._running, return_exceptions=True)

    async def _poll(self) -> None:
        if time.monotonic() < self._not_before:
            return
        try:
            if time.monotonic() - self._swept_at >= SWEEP_EVERY_S:
                await self._sweep()
                self._swept_at = time.monotonic()
            while len(self._running) < self._service.max_batches and await self._start_one():
                pass
        except StoreError as e:
            self._pause(f"Batches are paused: {e}")

    async def _start_one(self) -> bool:
        taken = await self._store.acquire(
            self._owner, ttl_s=self._options.lease_ttl_s, now=time.time(), is_dead=is_dead
        )
        if taken is None:
            return False
        lease, batch = taken
        log.info("Batch %s: %s, runner %d", batch.id, batch.status, lease.fence)
        runner = BatchRunner(
            self._store,
            self._files,
            self._executor,
            options=self._options,
            max_in_flight=self._max_in_flight,
            trials=self._trials,
        )
        task = asyncio.create_task(self._run(runner, lease, batch), name=batch.id)
        self._running[task] = runner
        task.add_done_callback(self._ended)
        return True

    async def _run(self, runner: BatchRunner, lease: Lease, batch: BatchRecord) -> None:
        try:
            ended = await runner.run(lease, batch)
        except LeaseLostError as e:
            log.warning("%s", e)
        except BatchError as e:
            self._pause(f"Batch {batch.id} is paused: {e}")
        except Exception:
            log.exception("Batch %s is paused: its runner failed.", batch.id)
            self._pause(None)
        else:
            log.info("Batch %s: %s, %d of %d", ended.id, ended.status, ended.num_completed, ended.num_lines)

    def _ended(self, task: asyncio.Task[None]) -> None:
        del self._running[task]
        self._wake.set()

    def _max_in_flight(self) -> int:
        """Per batch: running batches share the capacity evenly."""
        capacity = self._executor.capacity
        return max(1, capacity // max(1, len(self._running))) if capacity > 0 else 0

    def _pause(self, message: str | None) -> None:
        self._not_before = time.monotonic() + self._service.retry_after_s
        if message is not None:
            log.error("%s Retrying in %g s.", message, self._service.retry_after_s)

    async def _sweep(self) -> None:
        """Removes expired files, contents without a record, and the lines of batches that have ended."""
        for record in await self._store.expired_files(time.time()):
            await self._store.delete_file(record.id)
            await self._files.delete(record.id)
        for stray in await self._files.strays():
            if await self._store.get_file(stray) is None:
                await self._files.delete(stray)
        for batch_id in await self._store.unpurged():
            await self._store.purge(batch_id)
