"""The window of lines in flight: starts lines up to a limit, stores results in groups, and finds the lines that kill replicas.

A line that was running on a replica when it died becomes a suspect, which the store remembers. While there are suspects, only suspects
run, in ever smaller groups, until the line that is the cause is known (suspects.py); that line gets an error. Replicas that are lost in
other ways, or are full, only cost a pause. Does not renew the lease and does not end the batch: its runner does (runner.py).
"""

import asyncio
import logging
import random
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from cluster.batch.records import BatchRecord, Lease, LineResult, line_seed
from cluster.batch.run.executor import LineExecutor
from cluster.batch.run.feed import Feed, Work
from cluster.batch.run.suspects import Patience, Suspects, Trials
from cluster.batch.store.interface import Store
from cluster.tracing.origin import Origin, origin_var
from workers.errors import DeadlineExceededError, OverloadedError, ReplicaUnavailableError, TramontaneError

log = logging.getLogger(__name__)

COMMIT_LINES = 2000  # per transaction
MAX_UNSTORED = 4 * COMMIT_LINES  # answers that wait to be stored; with more, no line is started
MAX_UNSTORED_BYTES = 64 * 1024 * 1024
CHECK_EVERY_S = 0.25  # whether more lines may run


@dataclass(frozen=True, kw_only=True)
class WindowOptions:
    """patience: with lines that kill replicas. commit_every_s: how long results wait to be stored.

    min_pause_s, max_pause_s: the pause after a line found no replica; it doubles from the first to the second.
    """

    patience: Patience = field(default_factory=Patience)
    commit_every_s: float = 0.05
    min_pause_s: float = 0.2
    max_pause_s: float = 10.0


class Window:
    """Call `run` once: it returns after the last line. max_in_flight: how many lines may run at once at the moment."""

    def __init__(
        self,
        store: Store,
        feed: Feed,
        executor: LineExecutor,
        *,
        lease: Lease,
        batch: BatchRecord,
        max_in_flight: Callable[[], int],
        trials: Trials,
        options: WindowOptions,
    ) -> None:
        self._store = store
        self._feed = feed
        self._executor = executor
        self._lease = lease
        self._batch = batch
        self._max_in_flight = max_in_flight
        self._trials = trials
        self._options = options
        self._in_flight: dict[asyncio.Task[None], Work] = {}
        self._suspects = Suspects()
        self._retries: deque[Work] = deque()
        self._crashed: dict[int, ReplicaUnavailableError] = {}  # by line number; not stored yet
        self._unstored: list[LineResult] = []
        self._unstored_bytes = 0
        self._storing: asyncio.Task[None] | None = None
        self._judging: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._paused_until = 0.0
        self._pause_s = options.min_pause_s
        feed.on_ready = self._wake.set

    async def run(self) -> None:
        """Raises StoreError when results cannot be stored, LeaseLostError when another runner has the batch.

        In any case nothing keeps running afterwards, and the answers so far are stored if the store allows.
        """
        self._suspects = Suspects(await self._store.suspects(self._batch.id))
        try:
            while not self._is_done():
                self._wake.clear()
                await self._judge()
                self._store_results()
                await self._start_lines()
                await self._sleep()
        finally:
            try:
                await self._stop()
            finally:
                self._trials.end(self)

    def _is_done(self) -> bool:
        waiting = self._suspects or self._retries or not self._feed.is_empty
        return not (waiting or self._in_flight or self._crashed or self._unstored or self._storing)

    async def _sleep(self) -> None:
        """Waits until something happened, a pause is over, or more lines might be allowed."""
        if self._is_done() or self._crashed:
            return
        pause_s = self._paused_until - time.monotonic()
        delay_s = pause_s if 0 < pause_s < CHECK_EVERY_S else CHECK_EVERY_S
        timer = asyncio.get_running_loop().call_later(delay_s, self._wake.set)
        try:
            await self._wake.wait()
        finally:
            timer.cancel()

    async def _start_lines(self) -> None:
        full = len(self._unstored) >= MAX_UNSTORED or self._unstored_bytes >= MAX_UNSTORED_BYTES
        if full or time.monotonic() < self._paused_until:
            return
        limit, lines = self._max_in_flight(), [work.line for work in self._in_flight.values()]
        if self._suspects or any(line.crashes for line in lines):
            if all(line.crashes for line in lines) and self._trials.begin(self):
                while (line := self._suspects.pop(lines, limit)) is not None:
                    self._execute(await self._feed.work_for(line))
                    lines.append(line)
            return
        self._trials.end(self)
        while len(self._in_flight) < limit:
            work = self._retries.popleft() if self._retries else self._feed.pop()
            if work is None:
                return
            self._execute(work)

    def _execute(self, work: Work) -> None:
        task = asyncio.create_task(self._answer(work))
        self._in_flight[task] = work
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        del self._in_flight[task]
        self._wake.set()

    async def _answer(self, work: Work) -> None:
        line = work.line
        origin_var.set(Origin(self._batch.id, self._batch.traceparent))
        try:
            result = await self._executor.execute(
                line,
                endpoint=self._batch.endpoint,
                body=work.body,
                seed=line_seed(self._batch.id, line.custom_id),
                owner=self._batch.owner,
            )
        except ReplicaUnavailableError as e:
            if e.crashed:
                self._crashed[line.number] = e
            else:
                self._try_later(work, None)
        except OverloadedError as e:
            self._try_later(work, e.retry_after_s)
        except TramontaneError as e:
            code = "request_timeout" if isinstance(e, DeadlineExceededError) else "server_error"
            self._add(LineResult(number=line.number, error_code=code, error_message=str(e)))
        except Exception:
            log.exception("Line %d of %s failed.", line.number, self._batch.id)
            message = "The server failed on this request. Its log says why."
            self._add(LineResult(number=line.number, error_code="server_error", error_message=message))
        else:
            assert result.number == line.number, f"requested line {line.number}, got {result.number}"
            self._pause_s = self._options.min_pause_s
            self._add(result)

    def _add(self, result: LineResult) -> None:
        self._unstored.append(result)
        self._unstored_bytes += len(result.body)

    def _try_later(self, work: Work, after_s: float | None) -> None:
        if work.line.crashes:
            self._suspects.add(work.line)
        else:
            self._retries.append(work)
        now = time.monotonic()
        if now < self._paused_until:  # another line that was rejected at the same moment
            return
        delay_s = self._pause_s if after_s is None else after_s
        self._paused_until = now + min(delay_s, self._options.max_pause_s) * random.uniform(0.8, 1.2)
        self._pause_s = min(2 * self._pause_s, self._options.max_pause_s)

    async def _judge(self) -> None:
        """Adds a crash to each line that was in flight on a dead replica, in the store first."""
        if self._crashed:
            # Runs to its end even when this is cancelled: counting a crash twice or not at all would be wrong.
            self._judging = asyncio.create_task(self._count_crashes())
            await asyncio.shield(self._judging)

    async def _count_crashes(self) -> None:
        crashed, self._crashed = self._crashed, {}
        log.warning(
            "A replica died while it worked on %d lines of %s, which are retried in smaller groups: %s",
            len(crashed),
            self._batch.id,
            next(iter(crashed.values())),
        )
        for line in await self._store.add_crashes(self._lease, {number: e.alone for number, e in crashed.items()}):
            verdict = self._options.patience.verdict(line)
            if verdict is None:
                self._suspects.add(line)
                continue
            message = f"{verdict}, so it was skipped. The last one: {crashed[line.number]}"
            self._add(LineResult(number=line.number, error_code="replica_crashed", error_message=message))

    def _store_results(self) -> None:
        if self._storing is not None and self._storing.done():
            storing, self._storing = self._storing, None
            storing.result()
        if self._unstored and self._storing is None:
            self._storing = asyncio.create_task(self._store_soon())
            self._storing.add_done_callback(lambda _: self._wake.set())

    async def _store_soon(self) -> None:
        await asyncio.sleep(self._options.commit_every_s)
        await self._store_all()

    async def _store_all(self) -> None:
        while self._unstored:
            part = self._unstored[:COMMIT_LINES]
            await self._store.commit_results(self._lease, part)
            del self._unstored[: len(part)]
            self._unstored_bytes -= sum(len(result.body) for result in part)

    async def _stop(self) -> None:
        for task in list(self._in_flight):
            task.cancel()
        await asyncio.gather(*self._in_flight, return_exceptions=True)
        if self._storing is not None:
            await self._storing
        if self._judging is not None:
            await self._judging
        if self._crashed:
            await self._count_crashes()
        await self._store_all()
