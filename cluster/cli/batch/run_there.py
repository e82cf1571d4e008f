"""A job whose lines a running server answers: its batch is made there, waited for and fetched. Knows the order, and no HTTP.

The server may go away and come back at any moment; a wait outlasts that. What a command that died between two steps made on the server is
found by the run's id, so that nothing is done twice.
"""

import contextlib
import os
import time
from pathlib import Path

import msgspec

from cluster.api.schemas.batches import Batch
from cluster.batch.errors import StoreError
from cluster.batch.records import ENDED, MAX_REPLICAS_KEY, LineError
from cluster.cli.batch.job import Job, JobFolder, Outcome
from cluster.cli.batch.progress import Display, Snapshot
from cluster.cli.batch.remote import RUN_KEY, RemoteBatches
from cluster.cli.batch.steps import Lines, conclude, endpoint_of, refused
from workers.errors import ConfigError, ReplicaUnavailableError, RequestError

DEFAULT_WINDOW = "24h"
LOOK_EVERY_S = 1.0
RETRY_S = 2.0


def run_there(folder: JobFolder, job: Job, remote: RemoteBatches, display: Display) -> Job:
    """Brings the job to its end, from wherever it is; the caller holds the folder. Ctrl-C ends the waiting, and not the batch.

    Raises TramontaneError with a sentence for the user. Before the batch exists a server that does not answer is an error, later a pause.
    """
    if job.batch_id is None:
        job = _begin(folder, job, remote)
    assert job.batch_id is not None
    batch = _wait(remote, job.batch_id, display)
    if batch.status == "failed":
        folder.clear(keep_job=False)  # so that the same command can be given again with the file in order
        errors = batch.errors.data if batch.errors is not None else []
        raise refused(
            job.source, [LineError(code=e.code, message=e.message, line=e.line, param=e.param) for e in errors]
        )
    output = _fetch(folder, remote, batch.output_file_id, "output", display)
    error_file = _fetch(folder, remote, batch.error_file_id, "errors", display)
    outcome = Outcome(
        status=batch.status,
        num_lines=batch.request_counts.total,
        num_completed=batch.request_counts.completed,
        num_failed=batch.request_counts.failed,
        num_prompt_tokens=batch.usage.input_tokens,
        num_output_tokens=batch.usage.output_tokens,
    )
    return conclude(folder, job, outcome, output=output, errors=error_file)


def snapshot_of(batch: Batch, replicas: tuple[int, int] | None) -> Snapshot:
    """For a display."""
    return Snapshot(
        status=batch.status,
        num_lines=batch.request_counts.total,
        num_completed=batch.request_counts.completed,
        num_failed=batch.request_counts.failed,
        num_tokens=batch.usage.total_tokens,
        replicas=replicas,
    )


def _begin(folder: JobFolder, job: Job, remote: RemoteBatches) -> Job:
    """Makes the batch, or finds what an earlier command made of it."""
    staged, filename = folder.path / "input.jsonl", f"tramontane-{job.run_id}.jsonl"
    if not staged.exists():
        try:
            _stage(job, staged, model=job.request["model"] or remote.model())
        except (RequestError, ConfigError):  # nothing has begun: the same command can be given again, put right
            folder.clear(keep_job=False)
            raise
    if job.input_file_id is None:
        file = remote.find_file(filename) or remote.upload(staged, filename=filename)
        job = msgspec.structs.replace(job, input_file_id=file.id)
        folder.write(job)
    assert job.input_file_id is not None
    batch = remote.find(job.run_id)
    if batch is None:
        metadata = {RUN_KEY: job.run_id}
        if (most := job.options.get("max_replicas")) is not None:
            metadata[MAX_REPLICAS_KEY] = str(most)
        window = job.options.get("deadline") or DEFAULT_WINDOW
        batch = remote.create(
            input_file_id=job.input_file_id, endpoint=endpoint_of(staged), window=window, metadata=metadata
        )
    job = msgspec.structs.replace(job, batch_id=batch.id)
    folder.write(job)
    with contextlib.suppress(OSError):
        staged.unlink(missing_ok=True)
    return job


def _stage(job: Job, target: Path, *, model: str) -> None:
    temporary = target.with_name(f"{target.name}.part")
    try:
        with temporary.open("wb") as file:
            for chunk in Lines(job, model=model):
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except OSError as e:
        raise StoreError(f"{temporary} cannot be written: {e.strerror}. Nothing has begun.") from e


def _wait(remote: RemoteBatches, batch_id: str, display: Display) -> Batch:
    while True:
        try:
            batch = remote.get(batch_id)
        except ReplicaUnavailableError as e:
            display.trouble(f"{e} Asking on; the batch is safe there.")
            time.sleep(RETRY_S)
            continue
        if batch.status in ENDED:
            return batch
        display.show(snapshot_of(batch, remote.replicas()))
        time.sleep(LOOK_EVERY_S)


def _fetch(folder: JobFolder, remote: RemoteBatches, file_id: str | None, name: str, display: Display) -> Path | None:
    if file_id is None:
        return None
    target = folder.path / f"{name}.jsonl"
    while True:
        try:
            remote.download(file_id, target)
        except ReplicaUnavailableError as e:
            display.trouble(f"{e} Asking on; the batch is safe there.")
            time.sleep(RETRY_S)
        else:
            return target
