"""One sequence from its admission to its last delta: what it has produced, so that any replica can continue it.

Knows requests, deltas and the task that waits for them. Knows no replica's state, no order and no load. `record` returns the deltas
that one undisturbed replica would have sent, however many replicas took part.
"""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from cluster.tracing.sequence import SequenceTrace
from workers.errors import CrashedError, DeadlineExceededError, EngineError, ReplicaUnavailableError
from workers.protocol import BATCH_PRIORITY, GenerateRequest, TokenDelta

log = logging.getLogger(__name__)

# In a row, without a token in between. This many crashes may be the request's fault. Other losses are bad luck, but have a limit too.
MAX_CRASHES_WITHOUT_PROGRESS = 5
MAX_LOSSES_WITHOUT_PROGRESS = 20
FIRST_PAUSE_S = 0.5  # between the second loss and the third attempt; doubles with each further loss
MAX_PAUSE_S = 8.0

T = TypeVar("T")


class StreamMovedError(Exception):
    """The replica drains, and its streams continue elsewhere. Never leaves the router."""


@dataclass(slots=True)
class Trace:
    """The path of a request through the router, for the caller. `replica_id`: the newest replica. `numerics`: of the newest token's."""

    replica_id: str | None = None
    numerics: str | None = None
    queue_s: float | None = None  # from admission to the first replica
    num_cached_tokens_predicted: int | None = None
    num_failovers: int = 0
    num_numerics_changes: int = (
        0  # of them, to a replica with other numerics than the one that produced the token before
    )
    spans: SequenceTrace | None = None  # None for a sequence that is not traced


class Interrupt:
    """Ends a wait from outside with an error, and only a wait: a task that is not waiting gets the error at its next wait.

    Works like asyncio.timeout, but for the many short waits of one stream, at the cost of two assignments each.
    """

    def __init__(self) -> None:
        self._error: Exception | None = None
        self._loop: asyncio.AbstractEventLoop | None = None  # to ask for it is a system call
        self._task: asyncio.Task[object] | None = None
        self._cancelled = False

    def set(self, error: Exception) -> None:
        """Keeps the error until it is raised. Any error replaces a StreamMovedError; nothing replaces another error."""
        if self._error is not None and not isinstance(self._error, StreamMovedError):
            return
        self._error = error
        if self._task is not None and not self._cancelled:
            self._cancelled = True
            self._task.cancel()

    def forget(self, kind: type[Exception]) -> None:
        """Drops an error of this kind that has not been raised: it no longer applies."""
        if isinstance(self._error, kind) and not self._cancelled:
            self._error = None

    async def wait(self, start: Callable[[], Awaitable[T]]) -> T:
        """The result of what `start` begins. Raises the error given to `set`; a result that arrives during that is not lost."""
        if self._error is not None:
            raise self._pop_error()
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        task = asyncio.current_task(self._loop)
        assert task is not None
        num_cancels = task.cancelling()
        self._task = task
        try:
            return await start()
        except asyncio.CancelledError:
            if self._cancelled:
                self._cancelled = False
                if task.uncancel() <= num_cancels:  # otherwise the task was cancelled from elsewhere too
                    raise self._pop_error() from None
            raise
        finally:
            self._task = None

    def _pop_error(self) -> Exception:
        error, self._error = self._error, None
        assert error is not None
        return error


class Stream:
    """`order`: (priority, turn, arrival); smaller is served first.

    max_crashes: how many replicas may crash in all before the stream is given up; None: any number, as long as tokens come in between.
    """

    def __init__(
        self,
        request: GenerateRequest,
        *,
        order: tuple[float, ...],
        trace: Trace | None = None,
        max_crashes: int | None = None,
    ) -> None:
        self.request = request
        self.order = order
        self.is_background = order[0] >= BATCH_PRIORITY
        self.trace = trace or Trace()
        self.interrupt = Interrupt()
        self.output_token_ids = list(request.output_token_ids)
        self.numerics: str | None = None  # of the replica that produced the newest token; None before the first
        self.block_hashes: list[bytes] = []
        self.lost_on: set[object] = set()  # replicas to avoid on the next attempt
        self._started = False
        self._num_attempts = 0
        self._num_losses = 0
        self._num_crashes = 0
        self._num_crashes_total = 0
        self._max_crashes = max_crashes

    @property
    def num_tokens(self) -> int:
        """What a replica must have computed before the next token."""
        return len(self.request.prompt_token_ids) + len(self.output_token_ids)

    def token_ids(self) -> list[int]:
        return [*self.request.prompt_token_ids, *self.output_token_ids]

    def next_attempt(self) -> GenerateRequest:
        """The request for the next replica. Its id is new each time, so that a late delta of an earlier attempt is dropped."""
        self._num_attempts += 1
        if self._num_attempts == 1:
            return self.request
        return msgspec.structs.replace(
            self.request,
            request_id=f"{self.request.request_id}~{self._num_attempts}",
            output_token_ids=list(self.output_token_ids),
        )

    def record(self, delta: TokenDelta) -> TokenDelta:
        """Remembers a delta and returns it as the first replica would have sent it."""
        if self._num_attempts > 1:
            cached = None if self._started else delta.num_cached_tokens
            delta = msgspec.structs.replace(delta, request_id=self.request.request_id, num_cached_tokens=cached)
        self._started = True
        if delta.token_ids:
            self.output_token_ids += delta.token_ids
            if self._num_losses:
                self._num_losses = self._num_crashes = 0
                self.lost_on.clear()
        return delta

    @property
    def pause_s(self) -> float:
        """Before the next attempt. Random, so that a request that crashes replicas is separated from those that were there by chance."""
        if self._num_losses < 2:
            return 0.0
        return min(FIRST_PAUSE_S * 2.0 ** (self._num_losses - 2), MAX_PAUSE_S) * random.uniform(0.5, 1.0)

    def lose(self, replica: object, error: ReplicaUnavailableError, *, alone: bool) -> None:
        """The replica was lost. alone: it had no other request.

        Raises EngineError after too many losses since the last token, CrashedError if they were crashes.
        """
        self.trace.num_failovers += 1
        self.lost_on.add(replica)
        self._num_losses += 1
        self._num_crashes += error.crashed
        self._num_crashes_total += error.crashed
        in_a_row = (
            f"{self._num_losses} replicas in a row were lost while they worked on this request, the last one with: {error} "
            "The request is not tried again."
        )
        if self._num_crashes >= MAX_CRASHES_WITHOUT_PROGRESS:
            raise CrashedError(in_a_row, num_crashes=self._num_crashes_total, alone=alone) from error
        if error.crashed and self._max_crashes is not None and self._num_crashes_total >= self._max_crashes:
            times = "once" if self._num_crashes_total == 1 else f"{self._num_crashes_total} times"
            raise CrashedError(
                f"A replica crashed {times} while it worked on this request, the last time with: {error}",
                num_crashes=self._num_crashes_total,
                alone=alone,
            ) from error
        if self._num_losses >= MAX_LOSSES_WITHOUT_PROGRESS:
            raise EngineError(in_a_row) from error

    def end_after(self, left_s: float, *, given_s: float) -> Callable[[], None]:
        """Interrupts the stream with DeadlineExceededError in `left_s`; returns what cancels that. given_s: all the time it had."""
        error = DeadlineExceededError(
            f"The request was not complete after the {given_s:.2f} s it was given.",
            remedy="Give it more time or ask for fewer tokens.",
        )
        return asyncio.get_running_loop().call_later(max(0.0, left_s), self.interrupt.set, error).cancel

    def change_numerics(self, numerics: str, replica_id: str) -> bool:
        """A replica with these numerics has begun to produce. True if one with others produced the tokens before."""
        before, self.numerics = self.numerics, numerics
        if before is None:
            return False
        self.trace.num_numerics_changes += 1
        log.warning(
            "Request %s continues after %d tokens on replica %s, which computes other last bits (%s, before %s): its output may differ "
            "from that of an undisturbed run.",
            self.request.request_id, len(self.output_token_ids), replica_id, numerics, before,
        )  # fmt: skip
        return True

    def move(self) -> None:
        """It continues elsewhere, and no replica was lost."""
        self.trace.num_failovers += 1
