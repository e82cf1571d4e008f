"""Runs a job on a server: creates the batch there, waits for it and fetches the answers. Knows the order of these steps, and no HTTP.

The server may stop and come back at any time; waiting continues. If a command died between two steps, the next one finds what it created
on the server by the run's id, so that nothing is done twice.
"""

import contextlib
import time
from pathlib import Path

import msgspec

from cluster.api.schemas.batches import Batch
from cluster.batch.errors import StoreError
from cluster.batch.records import ENDED, MAX_REPLICAS_KEY, LineError
from cluster.cli.batch.job import Job, JobFolder, Outcome
from cluster.cli.batch.progress import Display, Snapshot
from cluster.cli.batch.remote import RUN_KEY, RemoteBatches
from cluster.cli.batch.steps import Lines, endpoint_of, finish, validation_error
from cluster.system.files import replace_file
from workers.errors import ConfigError, ReplicaUnavailableError, RequestError

DEFAULT_WINDOW = "24h"
POLL_EVERY_S = 1.0
RETRY_S = 2.0
STILL_WAITING = "Trying again; the batch is safe on the server."


def run_there(folder: JobFolder, job: Job, remote: RemoteBatches, display: Display) -> Job:
    """Runs the job to its end, from wherever it is. The caller has the folder's lock. Ctrl-C ends the wait but not the batch.

    Raises TramontaneError with a message for the user. A server that does not answer is an error before the batch exists, and only a
    pause afterwards.
    """
    if job.batch_id is None:
        job = _create(folder, job, remote)
    assert job.batch_id is not None
    batch = _wait(remote, job.batch_id, display)
    if batch.status == "failed":
        folder.clear(keep_job=False)  # so that the same command can run again once the file is corrected
        errors = batch.errors.data if batch.errors is not None else []
        raise validation_error(
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
    return finish(folder, job, outcome, output=output, errors=error_file)


def snapshot_of(batch: Batch, replicas: tuple[int, int] | None) -> Snapshot:
    """What a display shows. replicas: (ready, wanted), None if unknown."""
    return Snapshot(
        status=batch.status,
        num_lines=batch.request_counts.total,
        num_completed=batch.request_counts.completed,
        num_failed=batch.request_counts.failed,
        num_tokens=batch.usage.total_tokens,
        replicas=replicas,
    )


def _create(folder: JobFolder, job: Job, remote: RemoteBatches) -> Job:
    """Creates the batch, or finds what an earlier command created."""
    staged, filename = folder.path / "input.jsonl", f"tramontane-{job.run_id}.jsonl"
    if not staged.exists():
        try:
            _stage(job, staged, model=job.request["model"] or remote.model())
        except (RequestError, ConfigError):  # nothing was started: the same command can run again once it is corrected
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
    try:
        replace_file(target, lambda file: file.writelines(Lines(job, model=model)))
    except OSError as e:
        raise StoreError(f"{target} cannot be written: {e.strerror}.", remedy="Nothing was started.") from e


def _wait(remote: RemoteBatches, batch_id: str, display: Display) -> Batch:
    while True:
        try:
            batch = remote.get(batch_id)
        except ReplicaUnavailableError as e:
            display.trouble(f"{e.message} {STILL_WAITING}")
            time.sleep(RETRY_S)
            continue
        if batch.status in ENDED:
            return batch
        display.show(snapshot_of(batch, remote.replicas()))
        time.sleep(POLL_EVERY_S)


def _fetch(folder: JobFolder, remote: RemoteBatches, file_id: str | None, name: str, display: Display) -> Path | None:
    if file_id is None:
        return None
    target = folder.path / f"{name}.jsonl"
    while True:
        try:
            remote.download(file_id, target)
        except ReplicaUnavailableError as e:
            display.trouble(f"{e.message} {STILL_WAITING}")
            time.sleep(RETRY_S)
        else:
            return target
