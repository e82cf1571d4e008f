"""`tramontane batch run`, `resume`, `status`, `merge` and `cancel`: what they do and what they print.

The lines can be answered in three places: on a Ray that the command starts, on a running Ray (--ray-address), or on a server (--url). A
job is one output; its folder remembers all options except the key. Knows the order of the steps, not how each is done.
"""

import contextlib
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from cluster.cli.batch import locations
from cluster.cli.batch.job import Job, JobFolder, Outcome, find_job, folder_for
from cluster.cli.batch.job_from_options import (
    NOT_KEPT,
    check_locations,
    errors_location,
    existing_job,
    job_from_options,
    prepare_output,
)
from cluster.cli.batch.parts.merge import merge, remove_parts
from cluster.cli.batch.parts.status import describe_parts, status_of_parts
from cluster.cli.batch.progress import Display, Meter, Snapshot, describe
from cluster.cli.batch.remote import RemoteBatches
from cluster.cli.batch.run_there import run_there
from cluster.cli.batch.run_there import snapshot_of as remote_snapshot
from cluster.cli.batch.steps import NoLinesError, StoppedError, failed_lines_error, finish, summary
from cluster.terminal.phases import Console
from workers.errors import ConfigError, RequestError, TramontaneError


def run(args: Namespace) -> None:
    if args.url is not None and args.ray_address is not None:
        raise ConfigError(
            "--url and --ray-address both say where the batch runs.", remedy="Give one of them.", param="--url"
        )
    requested = job_from_options(args)
    folder = folder_for(requested.output, args.state_dir)
    if args.output == locations.STANDARD and args.state_dir is None:
        sys.stderr.write(f"This batch is remembered in {folder.path}.\n")
    with folder.lock():
        job = existing_job(folder, requested, overwrite=args.overwrite)
        if job is None:
            prepare_output(requested, overwrite=args.overwrite)
            check_locations(requested)
            folder.write(requested)
            job = requested
        elif job.outcome is None:
            sys.stderr.write("This batch was started before. Continuing it.\n")
        _run_to_end(folder, job, args)


def resume(args: Namespace) -> None:
    folder, job = find_job(args.target, args.state_dir)
    with folder.lock():
        job = folder.read() or job  # the process that had the lock may have ended the batch
        _run_to_end(folder, job, args)


def show_status(args: Namespace) -> None:
    if args.url is not None:
        with RemoteBatches(args.url, api_key=args.api_key, ca_cert=args.ca_cert) as remote:
            batch = remote.get(args.target)
        _print(batch, args, snapshot=remote_snapshot(batch, None))
        return
    try:
        folder, job = find_job(args.target, args.state_dir)
    except ConfigError:
        output = locations.absolute(args.target)
        if not (parts := status_of_parts(output)):
            raise
        _print(parts, args, note="\n".join(describe_parts(status, output) for status in parts))
        return
    if job.outcome is not None:
        _print(job.outcome, args, note=summary(job))
    elif job.url is not None:
        if job.batch_id is None:
            _print(None, args, note=_resume_hint(folder, job))
            return
        with _remote(job, args) as remote:
            batch = remote.get(job.batch_id)
        _print(batch, args, snapshot=remote_snapshot(batch, None))
    else:
        from cluster.cli.batch.local_batch import stored_batch
        from cluster.cli.batch.watch import snapshot_of

        record = stored_batch(folder, job)
        snapshot = None if record is None else snapshot_of(record, None)
        note = "" if folder.is_locked else f"No process is running it. {_resume_hint(folder, job)}"
        _print(record, args, snapshot=snapshot, note=note)


def join_parts(args: Namespace) -> None:
    output = locations.absolute(args.target)
    errors, folder = errors_location(output, args.errors), folder_for(output, args.state_dir)
    if output == locations.STANDARD:
        raise ConfigError("Standard output has no parts to merge.", remedy="Give the OUT that `run --part` was given.")
    with folder.lock():
        job = folder.read()
        if not args.overwrite and job is not None:
            found = f"A batch without --part has started to write {output}." if job.outcome is None else summary(job)
            raise ConfigError(found, remedy="Add --overwrite to replace it with the merged parts.", param="--overwrite")
        if not args.overwrite and locations.exists(output):
            raise ConfigError(
                f"{output} already exists.",
                remedy="Add --overwrite to replace it with the merged parts.",
                param="--overwrite",
            )
        locations.check_writable(output)
        locations.check_writable(errors)
        try:
            job = merge(folder, output, errors, num_parts=args.parts)
        except TramontaneError:
            if folder.read() is None:  # a failed merge must not leave a job
                folder.clear(keep_job=False)
            raise
        if args.remove_parts:
            remove_parts(output, errors, num_parts=args.parts)
    _report(job)


def cancel(args: Namespace) -> None:
    if args.url is not None:
        with RemoteBatches(args.url, api_key=args.api_key, ca_cert=args.ca_cert) as remote:
            batch = remote.cancel(args.target)
        sys.stdout.write(f"{batch.id} is {batch.status}.\n")
        return
    folder, job = find_job(args.target, args.state_dir)
    if job.outcome is not None:
        raise RequestError(f"The batch has ended already. {summary(job)}")
    if job.url is not None:
        if job.batch_id is None:
            raise RequestError(
                f"The batch has not been created at {job.url} yet.", remedy=f"Delete {folder.path} to drop it."
            )
        with _remote(job, args) as remote:
            status = remote.cancel(job.batch_id).status
        sys.stdout.write(f"{job.batch_id} is {status}. {_resume_hint(folder, job)}\n")
        return
    from cluster.cli.batch.local_batch import cancel_here, request_cancel

    if folder.is_locked:
        request_cancel(folder, job)
        sys.stdout.write("Cancelling the batch. The process that runs it writes the answers so far, and ends.\n")
        return
    with folder.lock():
        try:
            job = cancel_here(folder, job)
        except RequestError:
            folder.clear(keep_job=False)
            raise
    sys.stdout.write(f"{summary(job)}\n")


def _run_to_end(folder: JobFolder, job: Job, args: Namespace) -> None:
    """Runs the job and reports it. Errors and interruptions say how to continue."""
    if job.outcome is None:
        try:
            job = _run(folder, job, args)
        except NoLinesError:  # a pool may have more jobs than the file has lines
            empty = Outcome(status="completed", num_lines=0, num_completed=0, num_failed=0)
            job = finish(folder, job, empty, output=None, errors=None)
        except (KeyboardInterrupt, SystemExit, StoppedError):  # SystemExit: ray.init installs a SIGTERM handler
            raise StoppedError("Stopped.", remedy=_resume_hint(folder, folder.read() or job)) from None
        except TramontaneError as e:
            if (stored := folder.read()) is not None:  # otherwise nothing was started that could be resumed
                e.add_note(_resume_hint(folder, stored))
            raise
    _report(job)


def _run(folder: JobFolder, job: Job, args: Namespace) -> Job:
    given = {k: v for k, v in vars(args).items() if k not in NOT_KEPT}
    options = Namespace(**{**job.options, **{k: v for k, v in given.items() if v is not None}})
    options.log_level = args.log_level
    if job.url is None:
        from cluster.cli.batch.run_here import run_here

        return run_here(folder, job, options, Console())
    with (
        RemoteBatches(args.url or job.url, api_key=args.api_key, ca_cert=_path(options.ca_cert)) as remote,
        contextlib.closing(Display()) as display,
    ):
        return run_there(folder, job, remote, display)


@contextlib.contextmanager
def _remote(job: Job, args: Namespace) -> Iterator[RemoteBatches]:
    """The server of a job that has one."""
    assert job.url is not None
    with RemoteBatches(job.url, api_key=args.api_key, ca_cert=_path(job.options["ca_cert"])) as remote:
        yield remote


def _resume_hint(folder: JobFolder, job: Job) -> str:
    target = job.output if folder.path == folder_for(job.output, None).path else str(folder.path)
    command = f"`tramontane batch resume {target}`"
    if job.url is not None and job.batch_id is not None:
        return f"Nothing is lost, and the server at {job.url} continues the batch. Fetch its answers with {command}."
    hint = f"Nothing is lost. Continue with {command}."
    if (address := job.options.get("ray_address")) is not None:
        down = f"`tramontane down --ray-address {address} --name {job.deployment}`"
        hint += f" If you do not continue, remove what is left in Ray with {down}."
    return hint


def _report(job: Job) -> None:
    """Prints the summary. Raises LinesFailedError if lines have no answer."""
    sys.stderr.write(f"{summary(job)}\n")
    if (failed := failed_lines_error(job)) is not None:
        raise failed


def _print(value: Any, args: Namespace, *, snapshot: Snapshot | None = None, note: str = "") -> None:
    """Prints `value` with --json, otherwise the snapshot and the note."""
    if args.json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(value)).decode() + "\n")
        return
    lines = []
    if snapshot is not None:
        meter = Meter()
        meter.add(snapshot, 0.0)
        lines.append(f"{value.id}: {describe(snapshot, meter)}.")
    sys.stdout.write("\n".join([*lines, *filter(None, [note])]) + "\n")


def _path(text: str | Path | None) -> Path | None:
    return None if text is None else Path(text)
