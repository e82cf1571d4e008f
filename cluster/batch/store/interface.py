"""The interface of every store of files and batches. Each method is one transaction: all of it happens, or nothing.

Methods for runners take the runner's Lease and raise LeaseLostError when a newer lease exists, so that a runner that was paused or cut
off changes nothing afterwards. Every method raises StoreError when the database cannot be reached or written. Knows no SQL (sql_store.py).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, Protocol

from cluster.batch.records import BatchRecord, FileRecord, Lease, Line, LineError, LineResult
from cluster.responses.records import Append, ResponseLease, ResponseRecord, Step, Stored

Order = Literal["asc", "desc"]


class ResponseStore(Protocol):
    async def add(self, stored: Stored, *, owner: str | None, ttl_s: float, now: float) -> ResponseLease | None:
        """owner: who runs it from the start; None: the first that takes it."""

    async def get(self, response_id: str) -> Stored | None: ...

    async def follow(self, response_id: str, *, after: int) -> tuple[ResponseRecord, list[Step]] | None:
        """The record, and the steps from number `after` on, of one moment. None if there is no such response."""

    async def chain(self, response_id: str, *, most: int) -> list[Stored]:
        """The response and those that it continues, oldest first. Raises RequestError if one is missing, or if there are more."""

    async def acquire(
        self, owner: str, *, ttl_s: float, now: float, most: int, is_dead: Callable[[str], bool]
    ) -> list[tuple[ResponseLease, Stored, list[Step]]]:
        """Leases on responses that have not ended and that nobody runs, oldest first, with what was generated of them.

        is_dead: whether another owner, whose lease has not expired, is known to be dead.
        """

    async def adapters(self) -> set[str]:
        """The revisions that responses which have not ended name."""

    async def renew(self, leases: Sequence[ResponseLease], *, ttl_s: float, now: float) -> set[str]:
        """Extends the leases. Returns the responses of those that are lost."""

    async def release(self, lease: ResponseLease) -> None:
        """Lets another runner have the response at once. Does nothing for a lost lease."""

    async def append(self, appends: Sequence[Append]) -> set[str]:
        """Stores steps. Returns the responses whose leases are lost: nothing of those was stored."""

    async def end(
        self, response_id: str, build: Callable[[Stored, list[Step]], ResponseRecord]
    ) -> ResponseRecord | None:
        """Ends a response that is running, wherever it runs: its runner's lease is lost. Returns the new record; the old one of a response
        that has ended; None if there is none. build: pure, from the response and its steps to the new record."""

    async def delete(self, response_id: str) -> bool:
        """Returns whether it existed. A runner's lease is lost."""

    async def delete_expired(self, now: float, *, limit: int) -> int:
        """Returns how many there were."""


class Store(Protocol):
    @property
    def responses(self) -> ResponseStore: ...

    async def add_file(self, record: FileRecord) -> None: ...

    async def get_file(self, file_id: str) -> FileRecord | None: ...

    async def list_files(
        self,
        *,
        owner: str | None = None,
        purpose: str | None = None,
        after: str | None = None,
        limit: int = 10_000,
        order: Order = "desc",
    ) -> list[FileRecord]:
        """In order of creation. owner None: of all owners. after: the id of the last file seen. Raises RequestError for an unknown one."""

    async def delete_file(self, file_id: str) -> bool:
        """Returns whether the file existed. Raises RequestError while a batch that has not ended reads it."""

    async def expired_files(self, now: float, *, limit: int = 1000) -> list[FileRecord]:
        """Files whose `expires_at` has passed and that no running batch reads."""

    async def add_batch(self, batch: BatchRecord) -> None:
        """Raises RequestError when its input file does not exist."""

    async def get_batch(self, batch_id: str) -> BatchRecord | None: ...

    async def list_batches(
        self, *, owner: str | None = None, after: str | None = None, limit: int = 20
    ) -> list[BatchRecord]:
        """Newest first; `after` as in `list_files`."""

    async def running_batches(self) -> list[BatchRecord]:
        """Batches that have not ended, oldest first."""

    async def cancel_batch(self, batch_id: str, *, now: float) -> BatchRecord | None:
        """Requests a cancellation, which the batch's runner carries out. Returns the batch, unchanged if all its lines have run already."""

    async def acquire(
        self, owner: str, *, ttl_s: float, now: float, batch_id: str | None = None, is_dead: Callable[[str], bool]
    ) -> tuple[Lease, BatchRecord] | None:
        """A lease on the oldest batch that has work left and no live runner, or on `batch_id`; None if there is none.

        is_dead: whether another owner, whose lease has not expired, is known to be dead.
        """

    async def renew(self, lease: Lease, *, ttl_s: float, now: float) -> BatchRecord:
        """Extends the lease and returns the batch, whose status shows whether it was cancelled."""

    async def release(self, lease: Lease) -> None:
        """Lets another runner have the batch at once. Does nothing for a lost lease."""

    async def add_lines(self, lease: Lease, lines: Sequence[Line]) -> None:
        """Only while validating."""

    async def clear_lines(self, lease: Lease) -> None:
        """Removes the lines that an interrupted validation left."""

    async def duplicates(self, lease: Lease, *, limit: int) -> list[Line]:
        """Lines that repeat the custom_id of an earlier line, in line order."""

    async def fail(self, lease: Lease, errors: Sequence[LineError], *, now: float) -> BatchRecord:
        """validating -> failed."""

    async def plan(self, lease: Lease) -> None:
        """Gives each line its position (order.py). May be repeated."""

    async def start(self, lease: Lease, *, now: float, model: str | None) -> BatchRecord:
        """validating -> in_progress, with the number of lines and tokens. A batch that is being cancelled keeps its status."""

    async def pending_lines(self, batch_id: str, *, after: int, limit: int) -> list[Line]:
        """Unanswered lines without crashes whose position is greater than `after`, by position."""

    async def suspects(self, batch_id: str) -> list[Line]:
        """Unanswered lines with crashes, in line order."""

    async def add_crashes(self, lease: Lease, crashes: Mapping[int, bool]) -> list[Line]:
        """Adds one crash to each of these lines (number -> whether it was alone on the replica). Returns the changed lines."""

    async def commit_results(self, lease: Lease, results: Sequence[LineResult]) -> BatchRecord:
        """Stores results and counts them. Skips a result for a line that has one already: the first answer stands."""

    async def finalize(self, lease: Lease, *, now: float) -> BatchRecord:
        """in_progress -> finalizing: no more results are accepted. A batch that is being cancelled keeps its status."""

    async def answered(self, batch_id: str, *, after: int, limit: int) -> list[tuple[Line, LineResult | None]]:
        """Lines whose number is greater than `after`, in line order, each with its result, or None."""

    async def finish(
        self, lease: Lease, *, output: FileRecord | None, errors: FileRecord | None, now: float
    ) -> BatchRecord:
        """finalizing -> completed, or expired if lines are unanswered; cancelling -> cancelled. Adds the files and ends the lease."""

    async def purge(self, batch_id: str) -> None:
        """Removes lines and results of a batch that has ended; its files have them. Many short transactions; may be repeated."""

    async def unpurged(self) -> list[str]:
        """Ids of ended batches that still have lines."""

    async def close(self) -> None:
        """Idempotent."""
