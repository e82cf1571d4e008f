"""Runs stored responses while a gateway lives, and takes over those of gateways that died.

A response belongs to the holder of its lease. Its client may leave and come back, here or at another gateway: `follow` gives the same
steps to everybody. Knows leases, retries and readers; how steps are generated is the executor's business (executor.py).
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Callable
from typing import NamedTuple, Protocol

from cluster.api.server.errors import HTTPError, NotFoundError
from cluster.api.stored.journal import Journal
from cluster.api.stored.run import MAX_PENDING, Entered, Run
from cluster.batch.errors import StoreError
from cluster.batch.store.interface import ResponseStore
from cluster.responses.counts import ResponseCounts
from cluster.responses.items import ResponseError
from cluster.responses.records import ResponseLease, ResponseRecord, Step, Stored
from cluster.system.process import is_dead, new_owner
from cluster.system.tasks import cancel_all
from workers.errors import OverloadedError, ReplicaUnavailableError

log = logging.getLogger(__name__)

LEASE_TTL_S = 15.0
POLL_EVERY_S = 2.0
SWEEP_EVERY_S = 600.0
SWEEP_ROWS = 200  # per transaction
MAX_RUNS = 256  # at one gateway; the others wait in the store
READ_EVERY_S = 0.1  # a reader whose response runs at another gateway
RETRY_FOR_S = 900.0  # a response that finds no replica for so long has failed


class Progress(NamedTuple):
    """New steps of a response; `record` when it has ended. `error`: why it failed, if it failed here and just now.

    `num_numerics_changes`: see ResponseRecord.
    """

    steps: list[Step]
    record: ResponseRecord | None
    error: Exception | None = None
    num_numerics_changes: int = 0


class Executor(Protocol):
    def generate(self, run: Run, *, entered: Entered | None) -> AsyncGenerator[tuple[Step, str | None], None]:
        """The steps after those that the run has, each with the numerics of its replica. entered: its admission, if it has one.

        Raises what a generation raises.
        """

    def failure(self, error: Exception) -> ResponseError:
        """How a response shows this error."""


class ResponseService:
    """`start` it with an executor, and `stop` it. `store` may be used for whatever needs no runner. `counts`: for the metrics."""

    def __init__(
        self, store: ResponseStore, *, lease_ttl_s: float = LEASE_TTL_S, poll_every_s: float = POLL_EVERY_S
    ) -> None:
        self.store = store
        self.counts = ResponseCounts()
        self._lease_ttl_s = lease_ttl_s
        self._poll_every_s = poll_every_s
        self._owner = new_owner()
        self._journal = Journal(store)
        self._executor: Executor | None = None
        self._runs: dict[str, Run] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._wake = asyncio.Event()
        self._is_leaving = False
        self._stopped: Exception | None = None

    @property
    def num_runs(self) -> int:
        return len(self._runs)

    def start(self, executor: Executor) -> list[asyncio.Task[None]]:
        """The tasks end only on an error."""
        self._executor = executor
        self._tasks = [
            asyncio.create_task(self._journal.work(), name="responses journal"),
            asyncio.create_task(self._poll(), name="responses"),
        ]
        return self._tasks

    async def leave(self) -> None:
        """Takes no more responses, and leaves those that nobody here waits for to other gateways, or to the next start."""
        self._is_leaving = True
        await cancel_all(*(r.task for r in self._runs.values() if r.task is not None and not r.feed.num_readers))

    async def stop(self, error: Exception) -> None:
        """Leaves all of them. error: what those who wait here are told. Idempotent."""
        if self._stopped is not None:
            return
        self._is_leaving, self._stopped = True, error
        await cancel_all(*(run.task for run in self._runs.values() if run.task is not None))
        await cancel_all(*self._tasks)

    async def add(self, stored: Stored, *, entered: Entered | None = None) -> None:
        """Stores a response and runs it; `entered` is its admission, which is left when it ends. Raises StoreError."""
        runs_here = entered is not None or len(self._runs) < MAX_RUNS
        owner = self._owner if runs_here and self._executor is not None and not self._is_leaving else None
        try:
            lease = await self.store.add(stored, owner=owner, ttl_s=self._lease_ttl_s, now=time.time())
        except BaseException:
            if entered is not None:
                entered.stack.close()
            raise
        if lease is not None:
            self._begin(Run(stored, lease), entered)
        elif entered is not None:
            entered.stack.close()

    async def follow(self, response_id: str, *, after: int = 0, is_live: bool = True) -> AsyncGenerator[Progress, None]:
        """The steps from number `after` on, as they are stored, until the response has ended. is_live: each as soon as possible.

        Raises NotFoundError when it is deleted, StoreError, and the gateway's error when it stops.
        """
        while True:
            run = self._runs.get(response_id)
            if run is None or run.feed.is_cut:
                if self._stopped is not None:
                    raise self._stopped
                if run is not None and run.feed.error is not None:
                    raise run.feed.error
                found = await self.store.follow(response_id, after=after)
                if found is None:
                    raise NotFoundError("The response was deleted.", code="response_not_found")
                record, steps = found
                after += len(steps)
                yield Progress(steps, record if record.has_ended else None, None, record.num_numerics_changes)
                if record.has_ended:
                    return
                await asyncio.sleep(READ_EVERY_S)
                continue
            run.feed.num_readers += 1
            run.feed.num_live += is_live
            try:
                if is_live:
                    self._journal.hurry()
                while not run.feed.is_cut:
                    steps = run.feed.since(after) if run.feed.num_steps > after else []
                    after += len(steps)
                    record_now = run.feed.record
                    error = None if record_now is None else run.feed.error
                    yield Progress(steps, record_now, error, run.record.num_numerics_changes)
                    if record_now is not None:
                        return
                    await run.feed.wait(after)
            finally:
                run.feed.num_readers -= 1
                run.feed.num_live -= is_live

    async def end(self, response_id: str, end: Callable[[Stored, list[Step]], ResponseRecord]) -> ResponseRecord | None:
        """Ends a response wherever it runs; see ResponseStore.end."""
        made: list[ResponseRecord] = []

        def build(stored: Stored, steps: list[Step]) -> ResponseRecord:
            made[:] = [end(stored, steps)]  # again, if the transaction is repeated
            return made[0]

        record = await self.store.end(response_id, build)
        if made and record is made[0]:
            self.counts.ended[record.status] += 1
        self._lose(response_id)
        return record

    async def delete(self, response_id: str) -> bool:
        """Returns whether it existed. One that runs is aborted."""
        existed = await self.store.delete(response_id)
        self._lose(response_id)
        return existed

    def _lose(self, response_id: str) -> None:
        run = self._runs.get(response_id)
        if run is not None and run.feed.record is None:
            run.lose()

    def _begin(self, run: Run, entered: Entered | None) -> None:
        self._runs[run.id] = run
        self.counts.num_running = len(self._runs)
        run.task = asyncio.create_task(self._run(run, entered), name=run.id)
        run.task.add_done_callback(lambda _: self._ended(run))

    def _ended(self, run: Run) -> None:
        if self._runs.get(run.id) is run:
            del self._runs[run.id]
        self.counts.num_running = len(self._runs)
        if run.feed.record is not None:
            self.counts.ended[run.feed.record.status] += 1
        self._wake.set()

    async def _run(self, run: Run, entered: Entered | None) -> None:
        """To the end, or until it is lost or this gateway stops."""
        assert self._executor is not None
        try:
            error = None
            try:
                await self._generate(run, entered)
            except StoreError:
                raise
            except Exception as e:
                log.info("Response %s failed: %s", run.id, type(e).__name__)
                error = e
            await run.until_stored()
            if not run.feed.is_cut:
                run.finish(time.time(), error=None if error is None else self._executor.failure(error))
                run.feed.error = error
                self._journal.add(run)
                await run.until_ended()
        except StoreError as e:
            run.feed.cut(e)
        finally:
            if not run.is_lost and run.feed.record is None:
                run.feed.cut(self._stopped or run.feed.error)
                with contextlib.suppress(StoreError):
                    await self.store.release(run.lease)

    async def _generate(self, run: Run, entered: Entered | None) -> None:
        """All steps that are missing. A replica or room that is missing now is waited for."""
        assert self._executor is not None
        began = time.monotonic()
        while not run.is_finished:
            run.num_attempts += 1
            num_before = len(run.output_token_ids)
            steps = self._executor.generate(run, entered=entered)
            entered = None
            try:
                async with contextlib.aclosing(steps):
                    async for step, numerics in steps:
                        run.add(step, numerics=numerics)
                        self._journal.add(run)
                        await run.until_stored(MAX_PENDING)
            except (ReplicaUnavailableError, OverloadedError, HTTPError) as e:
                if isinstance(e, HTTPError) and e.status != 503:
                    raise
                if len(run.output_token_ids) > num_before:
                    began = time.monotonic()
                if time.monotonic() - began > RETRY_FOR_S:
                    raise
                log.debug("Response %s waits after %d tokens: %s", run.id, len(run.output_token_ids), e)
                await asyncio.sleep(min(e.retry_after_s, 5) if isinstance(e, OverloadedError) else 1.0)

    async def _poll(self) -> None:
        renewed_at = swept_at = -float("inf")
        while True:
            self._wake.clear()
            try:
                now = time.monotonic()
                if now - renewed_at >= self._lease_ttl_s / 4:
                    renewed_at = now
                    await self._renew()
                if now - swept_at >= SWEEP_EVERY_S:
                    swept_at = now
                    while await self.store.delete_expired(time.time(), limit=SWEEP_ROWS) == SWEEP_ROWS:
                        pass
                await self._take_over()
            except StoreError as e:
                log.warning("The store of responses cannot be used now: %s", e)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._poll_every_s):
                    await self._wake.wait()

    async def _renew(self) -> None:
        leases = [run.lease for run in self._runs.values() if run.feed.record is None and not run.feed.is_cut]
        if leases:
            for response_id in await self.store.renew(leases, ttl_s=self._lease_ttl_s, now=time.time()):
                self._lose(response_id)

    async def _take_over(self) -> None:
        most = MAX_RUNS - len(self._runs)
        if most <= 0 or self._is_leaving:
            return
        taken: list[tuple[ResponseLease, Stored, list[Step]]] = await self.store.acquire(
            self._owner, ttl_s=self._lease_ttl_s, now=time.time(), most=most, is_dead=is_dead
        )
        for lease, stored, steps in taken:
            log.info("Response %s: continues here after %d steps.", stored.record.id, len(steps))
            self.counts.num_taken_over += lease.fence > 1
            self._begin(Run(stored, lease, steps), None)
