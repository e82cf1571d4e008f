"""Runs one batch from wherever the last runner left it to its end: validate, answer, finalize. All progress is in the store.

A runner holds the batch's lease and renews it; it stops at once when another runner has taken over the batch. The deadline or a
cancellation ends the answering: lines in flight are aborted, and answers so far are kept.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from cluster.batch import lines
from cluster.batch.errors import BatchError, StoreError
from cluster.batch.files import FileContents
from cluster.batch.records import BatchRecord, Lease, LineError
from cluster.batch.run.executor import LineExecutor
from cluster.batch.run.feed import Feed
from cluster.batch.run.output import file_id, write_output
from cluster.batch.run.suspects import Trials
from cluster.batch.run.window import Window, WindowOptions
from cluster.batch.store.interface import Store
from cluster.system.process import is_dead, new_owner
from cluster.system.tasks import cancel_all

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RunnerOptions:
    """lease_ttl_s: a runner that has not renewed its lease for this long loses the batch.

    check_every_s: how soon a cancellation is seen.
    """

    lease_ttl_s: float = 15.0
    check_every_s: float = 1.0
    max_line_bytes: int = lines.MAX_LINE_BYTES
    max_lines: int = lines.MAX_LINES
    max_errors: int = lines.MAX_ERRORS
    window: WindowOptions = field(default_factory=WindowOptions)


class BatchRunner:
    """Call `run` once.

    max_in_flight: how many of its lines may run at once at the moment; None for the executor's capacity. trials: shared by all runners
    whose lines may be on the same replicas.
    """

    def __init__(
        self,
        store: Store,
        files: FileContents,
        executor: LineExecutor,
        *,
        options: RunnerOptions,
        max_in_flight: Callable[[], int] | None = None,
        trials: Trials | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._files = files
        self._executor = executor
        self._options = options
        self._max_in_flight = max_in_flight or (lambda: executor.capacity)
        self._trials = trials or Trials()
        self._clock = clock
        self._cancelled = asyncio.Event()
        self._wake = asyncio.Event()

    def wake(self) -> None:
        """Checks soon whether the batch was cancelled."""
        self._wake.set()

    async def run(self, lease: Lease, batch: BatchRecord) -> BatchRecord:
        """Runs the batch to its end and returns it; the lease has ended then.

        Raises LeaseLostError when another runner has the batch, and StoreError when the store or the files cannot be written. The batch
        then stays as it is, without a lease, and the next runner continues from there. The same happens when this is cancelled.
        """
        work = asyncio.create_task(self._run(lease, batch))
        keeper = asyncio.create_task(self._keep_lease(lease))
        try:
            await asyncio.wait((work, keeper), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():  # the keeper ends only when the lease is lost
                await cancel_all(work)
                keeper.result()
            return await work
        finally:
            await cancel_all(work, keeper)
            with contextlib.suppress(StoreError):  # the lease expires by itself
                await self._store.release(lease)

    async def _keep_lease(self, lease: Lease) -> None:
        renewed_at = -float("inf")
        while True:
            self._wake.clear()
            with contextlib.suppress(TimeoutError):  # not wait_for, which may swallow a cancellation on Python 3.11
                async with asyncio.timeout(self._options.check_every_s):
                    await self._wake.wait()
            try:
                if time.monotonic() - renewed_at >= self._options.lease_ttl_s / 4:
                    found: BatchRecord | None = await self._store.renew(
                        lease, ttl_s=self._options.lease_ttl_s, now=self._clock()
                    )
                    renewed_at = time.monotonic()
                else:
                    found = await self._store.get_batch(lease.batch_id)
            except StoreError as e:
                # Continuing is safe: every write is checked against the lease.
                log.warning("Cannot renew the lease of %s: %s", lease.batch_id, e)
                continue
            if found is not None and found.status == "cancelling":
                self._cancelled.set()

    async def _run(self, lease: Lease, batch: BatchRecord) -> BatchRecord:
        if batch.status == "validating":
            batch = await self._validate(lease, batch)
        if batch.status == "in_progress":
            batch = await self._answer(lease, batch)
        if batch.status in ("finalizing", "cancelling"):
            batch = await self._finalize(lease, batch)
        try:
            await self._store.purge(batch.id)
        except StoreError as e:  # the batch has ended anyway; a later sweep removes its lines
            log.warning("Cannot remove the lines of %s yet: %s", batch.id, e)
        return batch

    async def _validate(self, lease: Lease, batch: BatchRecord) -> BatchRecord:
        await self._store.clear_lines(lease)
        if self._clock() >= batch.expires_at:
            message = "The completion window ended before the requests could be checked."
            return await self._store.fail(lease, [LineError(code="batch_expired", message=message)], now=self._clock())
        errors: list[LineError] = []
        models: set[str] = set()
        source = await asyncio.to_thread(self._files.open, batch.input_file_id)
        try:
            chunks = lines.scan(
                source,
                endpoint=batch.endpoint,
                check=partial(self._executor.check, owner=batch.owner),
                max_line_bytes=self._options.max_line_bytes,
                max_lines=self._options.max_lines,
            )
            while (chunk := await asyncio.to_thread(next, chunks, None)) is not None:
                errors += chunk.errors
                if len(errors) >= self._options.max_errors or self._cancelled.is_set():
                    break
                if not errors:
                    await self._store.add_lines(lease, chunk.lines)
                if len(models) < 2:
                    models |= chunk.models
        finally:
            source.close()
        if not errors and not self._cancelled.is_set():
            found = await self._store.duplicates(lease, limit=self._options.max_errors)
            errors = [lines.duplicate_error(line) for line in found]
        if errors:
            return await self._store.fail(lease, errors[: self._options.max_errors], now=self._clock())
        await self._store.plan(lease)
        return await self._store.start(lease, now=self._clock(), model=models.pop() if len(models) == 1 else None)

    async def _answer(self, lease: Lease, batch: BatchRecord) -> BatchRecord:
        feed = Feed(self._store, self._files, batch)
        window = Window(
            self._store,
            feed,
            self._executor,
            lease=lease,
            batch=batch,
            max_in_flight=self._max_in_flight,
            trials=self._trials,
            options=self._options.window,
        )
        answering = asyncio.create_task(window.run())
        ending = asyncio.create_task(self._until_deadline_or_cancelled(batch))
        try:
            await asyncio.wait((answering, ending), return_when=asyncio.FIRST_COMPLETED)
            ending.cancel()
            if not answering.done():
                answering.cancel()
                await asyncio.wait((answering,))
            if not answering.cancelled():
                answering.result()
        finally:
            await cancel_all(answering, ending)
            await feed.close()
        return await self._store.finalize(lease, now=self._clock())

    async def _until_deadline_or_cancelled(self, batch: BatchRecord) -> None:
        while self._clock() < batch.expires_at and not self._cancelled.is_set():
            left_s = min(batch.expires_at - self._clock(), self._options.check_every_s)
            with contextlib.suppress(TimeoutError):  # not wait_for, which may swallow a cancellation on Python 3.11
                async with asyncio.timeout(max(left_s, 0.001)):
                    await self._cancelled.wait()

    async def _finalize(self, lease: Lease, batch: BatchRecord) -> BatchRecord:
        if batch.in_progress_at is None:  # cancelled before its lines were known
            await self._store.clear_lines(lease)
            return await self._store.finish(lease, output=None, errors=None, now=self._clock())
        batch = await self._store.finalize(lease, now=self._clock())
        output, errors = await write_output(self._store, self._files, lease=lease, batch=batch, now=self._clock())
        await self._remove_attempts(lease)  # before the batch ends: afterwards no runner would do it
        return await self._store.finish(lease, output=output, errors=errors, now=self._clock())

    async def _remove_attempts(self, lease: Lease) -> None:
        """Deletes the output files that earlier runners of this batch wrote."""
        for fence in range(1, lease.fence):
            earlier = Lease(batch_id=lease.batch_id, owner=lease.owner, fence=fence)
            for kind in ("output", "error"):
                await self._files.delete(file_id(earlier, kind))


async def run_batch(
    store: Store, files: FileContents, executor: LineExecutor, batch_id: str, *, options: RunnerOptions | None = None
) -> BatchRecord:
    """Runs this batch to its end, or returns it if it has ended already.

    Raises BatchError while another process runs it, and otherwise the same as BatchRunner.run.
    """
    options = options or RunnerOptions()
    taken = await store.acquire(
        new_owner(), ttl_s=options.lease_ttl_s, now=time.time(), batch_id=batch_id, is_dead=is_dead
    )
    if taken is not None:
        return await BatchRunner(store, files, executor, options=options).run(*taken)
    batch = await store.get_batch(batch_id)
    if batch is None:
        raise BatchError(f"There is no batch {batch_id}.")
    if not batch.has_ended:
        raise BatchError(f"Another process is running {batch_id}.", remedy="Wait until it ends, or stop it first.")
    await store.purge(batch_id)
    return batch
