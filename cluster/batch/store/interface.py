"""What every store of files and batches can do, whatever database it is. Each method is one transaction: all of it or nothing.

A runner's methods take its Lease and raise LeaseLostError when a younger one exists; so what a paused or cut-off runner still sends changes
nothing. Every method raises StoreError when the database cannot be reached or written. Knows no SQL (sql_store.py).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, Protocol

from cluster.batch.records import BatchRecord, FileRecord, Lease, Line, LineError, LineResult

Order = Literal["asc", "desc"]


class Store(Protocol):
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
        """By time of creation. `owner` None: everybody's. `after`: the id of the last one seen; unknown: RequestError."""

    async def delete_file(self, file_id: str) -> bool:
        """Whether there was one. Raises RequestError while a batch that has not ended reads it."""

    async def expired_files(self, now: float, *, limit: int = 1000) -> list[FileRecord]:
        """Whose `expires_at` is past and that no running batch reads."""

    async def add_batch(self, batch: BatchRecord) -> None:
        """Raises RequestError when its input file is not, or no longer, there."""

    async def get_batch(self, batch_id: str) -> BatchRecord | None: ...

    async def list_batches(
        self, *, owner: str | None = None, after: str | None = None, limit: int = 20
    ) -> list[BatchRecord]:
        """Youngest first; `after` as in `list_files`."""

    async def running_batches(self) -> list[BatchRecord]:
        """All that have not ended, oldest first."""

    async def cancel_batch(self, batch_id: str, *, now: float) -> BatchRecord | None:
        """Asks for it: the runner that holds the batch ends it. Returns the batch as it is now; unchanged if it is past running."""

    async def acquire(
        self, owner: str, *, ttl_s: float, now: float, batch_id: str | None = None, is_dead: Callable[[str], bool]
    ) -> tuple[Lease, BatchRecord] | None:
        """A lease on the oldest batch that has work left and no living runner, or on this one; None if there is none.

        `is_dead` tells of another owner, whose lease still runs, whether it surely no longer lives.
        """

    async def renew(self, lease: Lease, *, ttl_s: float, now: float) -> BatchRecord:
        """Prolongs the lease, and tells the batch's state: whether somebody cancelled it."""

    async def release(self, lease: Lease) -> None:
        """Another runner may have it at once. Harmless for one that is lost."""

    async def add_lines(self, lease: Lease, lines: Sequence[Line]) -> None:
        """While validating."""

    async def clear_lines(self, lease: Lease) -> None:
        """Forgets what an interrupted validation left."""

    async def duplicates(self, lease: Lease, *, limit: int) -> list[Line]:
        """Lines whose custom_id stands on an earlier line too, in line order."""

    async def fail(self, lease: Lease, errors: Sequence[LineError], *, now: float) -> BatchRecord:
        """validating -> failed."""

    async def plan(self, lease: Lease) -> None:
        """Gives each line its position (cluster/batch/store/order.py). May be repeated."""

    async def start(self, lease: Lease, *, now: float, model: str | None) -> BatchRecord:
        """validating -> in_progress, with the number of lines and their tokens. A batch being cancelled stays so."""

    async def pending_lines(self, batch_id: str, *, after: int, limit: int) -> list[Line]:
        """Unanswered lines with no crashes whose position is greater than `after`, in that order."""

    async def suspects(self, batch_id: str) -> list[Line]:
        """Unanswered lines that have crashes, in order of position."""

    async def add_crashes(self, lease: Lease, crashes: Mapping[int, bool]) -> list[Line]:
        """One crash more for each of these lines, by number: whether it was alone on that replica. Returns them as they are now."""

    async def commit_results(self, lease: Lease, results: Sequence[LineResult]) -> BatchRecord:
        """Stores results and counts them. One for a line that has an answer already is left out: the first answer stands."""

    async def finalize(self, lease: Lease, *, now: float) -> BatchRecord:
        """in_progress -> finalizing: no results are taken from here on. A batch being cancelled stays so, and takes none either."""

    async def answered(self, batch_id: str, *, after: int, limit: int) -> list[tuple[Line, LineResult | None]]:
        """Lines with number greater than `after`, in line order, with their results: None where there is none."""

    async def finish(
        self, lease: Lease, *, output: FileRecord | None, errors: FileRecord | None, now: float
    ) -> BatchRecord:
        """finalizing -> completed, or expired if lines are unanswered; cancelling -> cancelled. Adds the files; ends the lease."""

    async def purge(self, batch_id: str) -> None:
        """Forgets lines and results of a batch that has ended: its files say them. Many short transactions; may be repeated."""

    async def unpurged(self) -> list[str]:
        """Ended batches that still have lines."""

    async def close(self) -> None:
        """Idempotent."""
