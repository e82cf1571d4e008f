"""One response that this gateway runs: what is stored, what waits to be stored, and how it ended. Knows no store and no replica."""

import asyncio
from collections.abc import Sequence
from contextlib import ExitStack
from typing import NamedTuple

import msgspec

from cluster.api.stored.feed import Feed
from cluster.responses import build
from cluster.responses.items import ResponseError
from cluster.responses.records import (
    Append,
    ResponseLease,
    Step,
    Stored,
    encode_steps,
    usage_of,
)
from cluster.router.admission.admission import Admission

MAX_PENDING = 256  # steps that wait to be stored, before the generation waits as well


class Entered(NamedTuple):
    """An admission that was made before the response was stored. `stack`: leaves it. `arrived`: on the clock of time.monotonic()."""

    stack: ExitStack
    admission: Admission
    arrived: float


class Run:
    """`output_token_ids`: all that was generated, stored or not. `is_lost`: another runner has it, or it was cancelled or deleted."""

    def __init__(self, stored: Stored, lease: ResponseLease, steps: Sequence[Step] = ()) -> None:
        self.stored = stored
        self.record = stored.record
        self.lease = lease
        self.feed = Feed(steps)
        self.output_token_ids = [token_id for step in steps for token_id in step.token_ids]
        self.is_finished = bool(steps) and steps[-1].finish_reason is not None
        self.is_lost = False
        self.num_attempts = 0
        self.task: asyncio.Task[None] | None = None
        self._num_steps = len(steps)
        self._pending: list[Step] = []
        self._storing: list[Step] = []
        self._has_new_record = False
        self._changed = asyncio.Event()

    @property
    def id(self) -> str:
        return self.record.id

    @property
    def is_fresh(self) -> bool:
        """Whether nothing was generated yet."""
        return self._num_steps == 0

    def add(self, step: Step, *, numerics: str | None) -> None:
        """The next step. numerics: of the replica that generated it."""
        if self.record.status == "queued" or numerics != self.record.numerics:
            self.record = msgspec.structs.replace(
                self.record,
                status="in_progress",
                numerics=numerics,
                num_numerics_changes=self.record.num_numerics_changes + (self.record.numerics not in (None, numerics)),
            )
            self._has_new_record = True
        self._pending.append(step)
        self._num_steps += 1
        self.output_token_ids += step.token_ids
        self.is_finished = step.finish_reason is not None

    def finish(self, now: float, *, error: ResponseError | None = None) -> None:
        """The record for the end. error: why it has no proper end. Call it when all steps are stored."""
        steps, request = self.feed.since(0), self.stored.request
        num_prompt_tokens = len(request.generate.prompt_token_ids)
        if error is None:
            self.record = build.end(self.record, request.asked, steps, num_prompt_tokens=num_prompt_tokens, now=now)
        else:
            self.record = msgspec.structs.replace(
                self.record,
                status="failed",
                error=error,
                output=build.output_of(self.record, request.asked, steps, status="incomplete"),
                usage=usage_of(num_prompt_tokens, steps),
            )
        self._has_new_record = True

    # For the journal.

    def take(self) -> Append:
        """What is not stored yet."""
        self._storing, self._pending = self._pending, []
        record = self.record if self._has_new_record else None
        self._has_new_record = False
        data = encode_steps(self._storing) if self._storing else b""
        return Append(lease=self.lease, number=self.feed.num_steps, data=data, record=record)

    def stored_now(self, append: Append) -> None:
        """What `take` returned is stored."""
        num_steps, self._storing = len(self._storing), []
        if num_steps:
            self.feed.push(append.data, num_steps)
        if append.record is not None and append.record.has_ended:
            self.feed.end(append.record)
        self._notify()

    def lose(self) -> None:
        """The lease is lost: whatever is pending is nothing to store."""
        self.is_lost = True
        self._pending, self._storing, self._has_new_record = [], [], False
        self.feed.cut()
        self._notify()
        if self.task is not None:
            self.task.cancel()

    def fail(self, error: Exception) -> None:
        """It cannot be stored now; the next runner repeats what is lost."""
        self.feed.cut(error)
        self._notify()
        if self.task is not None:
            self.task.cancel()

    async def until_stored(self, most: int = 0) -> None:
        """Returns when at most so many steps wait to be stored, or when it is cut off."""
        while not self.feed.is_cut and len(self._pending) + len(self._storing) > most:
            await self._changed.wait()

    async def until_ended(self) -> None:
        """Returns when the record of the end is stored, or when it is cut off."""
        while not self.feed.is_cut and self.feed.record is None:
            await self._changed.wait()

    def _notify(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
