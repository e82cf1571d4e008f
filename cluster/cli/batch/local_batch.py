"""The batch of a job that runs on this machine, in the store of the job's folder: created, looked up, cancelled, delivered.

Runs no lines and knows no Ray (run_here.py).
"""

import asyncio
import contextlib
import time
from collections.abc import Iterator

from cluster.batch.errors import BatchError
from cluster.batch.files import FileContents
from cluster.batch.records import BatchRecord, FileRecord, Line, LineResult, parse_window
from cluster.batch.run.executor import LineExecutor
from cluster.batch.run.runner import run_batch
from cluster.batch.store.interface import Store
from cluster.batch.store.open import SQLITE_NAME, open_files, open_store
from cluster.cli.batch.job import Job, JobFolder, Outcome
from cluster.cli.batch.steps import Lines, finish, validation_error
from workers.errors import RequestError

NO_DEADLINE = "365d"  # the longest window


@contextlib.contextmanager
def opened(folder: JobFolder) -> Iterator[tuple[Store, FileContents]]:
    """The job's store and files. Raises StoreError. Outside of any event loop."""
    store, files = open_store(folder.path), open_files(folder.path)
    try:
        yield store, files
    finally:
        asyncio.run(store.close())


async def create(store: Store, files: FileContents, job: Job, *, model: str) -> BatchRecord:
    """The job's batch in the store, created if it does not exist. model: for lines that name none.

    Raises RequestError, ConfigError and LocationError for an input that cannot be read or converted.
    """
    assert job.batch_id is not None and job.input_file_id is not None, "a job that runs here names both from the start"
    if (batch := await store.get_batch(job.batch_id)) is not None:
        return batch
    lines, now = Lines(job, model=model), int(time.time())
    num_bytes = await files.write(job.input_file_id, lines)
    if await store.get_file(job.input_file_id) is None:
        name = f"{job.run_id}.jsonl"
        record = FileRecord(id=job.input_file_id, filename=name, purpose="batch", num_bytes=num_bytes, created_at=now)
        await store.add_file(record)
    window = job.options.get("deadline") or NO_DEADLINE
    batch = BatchRecord(
        id=job.batch_id,
        endpoint=lines.endpoint,
        input_file_id=job.input_file_id,
        completion_window=window,
        created_at=now,
        expires_at=now + parse_window(window),
    )
    await store.add_batch(batch)
    return batch


def stored_batch(folder: JobFolder, job: Job) -> BatchRecord | None:
    """The batch as it is in the store; None before it was created."""
    if job.batch_id is None or not (folder.path / SQLITE_NAME).exists():
        return None
    with opened(folder) as (store, _):
        return asyncio.run(store.get_batch(job.batch_id))


def request_cancel(folder: JobFolder, job: Job) -> None:
    """Cancels a job that another process is running. That process notices within a second or two."""
    with opened(folder) as (store, _):
        if job.batch_id is None or asyncio.run(store.cancel_batch(job.batch_id, now=time.time())) is None:
            raise BatchError(
                "The batch is still being prepared.", remedy="Stop the process that prepares it with Ctrl-C."
            )


def cancel_here(folder: JobFolder, job: Job) -> Job:
    """Cancels a job that no process is running, and delivers its answers so far. The caller has the folder's lock."""

    async def cancelled(store: Store, files: FileContents) -> BatchRecord:
        assert job.batch_id is not None, "a job that runs here names its batch from the start"
        batch = await store.cancel_batch(job.batch_id, now=time.time())
        if batch is None:
            raise RequestError("The batch had not started yet.")
        return await write_files(store, files, batch)

    with opened(folder) as (store, files):
        return deliver(folder, job, files, asyncio.run(cancelled(store, files)))


async def write_files(store: Store, files: FileContents, batch: BatchRecord) -> BatchRecord:
    """Ends a batch whose lines need no more answers: only its files are written."""
    return batch if batch.has_ended else await run_batch(store, files, _NoExecutor(), batch.id)


def deliver(folder: JobFolder, job: Job, files: FileContents, batch: BatchRecord) -> Job:
    """Puts the files of an ended batch in place. Raises RequestError for a batch that failed validation."""
    if batch.status == "failed":
        folder.clear(keep_job=False)  # so that the same command can run again once the file is corrected
        raise validation_error(job.source, batch.errors)
    outcome = Outcome(
        status=batch.status,
        num_lines=batch.num_lines,
        num_completed=batch.num_completed,
        num_failed=batch.num_failed,
        num_prompt_tokens=batch.num_prompt_tokens,
        num_output_tokens=batch.num_output_tokens,
    )
    output = None if batch.output_file_id is None else files.path(batch.output_file_id)
    errors = None if batch.error_file_id is None else files.path(batch.error_file_id)
    return finish(folder, job, outcome, output=output, errors=errors)


class _NoExecutor(LineExecutor):
    """For a batch of which only the files are left to write."""

    @property
    def capacity(self) -> int:
        return 0

    def check(self, endpoint: str, body: bytes, *, owner: str) -> str:
        raise AssertionError("this batch is past its validation")

    async def execute(self, line: Line, *, endpoint: str, body: bytes, seed: int, owner: str) -> LineResult:
        raise AssertionError("this batch is past its lines")
