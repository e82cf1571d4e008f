"""`tramontane batch run`, `resume`, `status`, `merge` and `cancel`: what they do and what they print.

Three places can answer the lines: a Ray of the command's own, one that runs (--ray-address), and a server (--url). A job is one output;
its folder remembers all that was asked, without the key. Knows which step follows which, and nothing of how it is done.
"""

import argparse
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from cluster.cli.batch import locations
from cluster.cli.batch.job import Job, JobFolder, Outcome, find_job, folder_for
from cluster.cli.batch.job_from_options import NOT_KEPT, check_places, errors_of, job_in, job_of, make_way
from cluster.cli.batch.options import (
    AddOptions,
    add_part_option,
    add_place_options,
    add_request_options,
    add_server_options,
    positive,
)
from cluster.cli.batch.parts.merge import merge, remove_parts
from cluster.cli.batch.parts.status import sentence, status_of_parts
from cluster.cli.batch.progress import Display, Meter, Snapshot, describe
from cluster.cli.batch.remote import RemoteBatches
from cluster.cli.batch.run_there import run_there
from cluster.cli.batch.run_there import snapshot_of as remote_snapshot
from cluster.cli.batch.steps import NoLinesError, StoppedError, conclude, failure, summary
from cluster.system.log import LOG_LEVELS
from cluster.terminal.phases import Console
from workers.errors import ConfigError, RequestError, TramontaneError


def add_parser(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]", *, add_engine_options: AddOptions
) -> None:
    """Adds `batch` and its own subcommands; each sets `run`. add_engine_options: those of `serve`."""
    about = "Answers every line of a file exactly once, whatever dies meanwhile."
    batch = commands.add_parser("batch", help="answer every line of a file, exactly once", description=about)
    kinds = batch.add_subparsers(required=True, metavar="COMMAND")

    run = _command(kinds, "run", _run, "answer the lines of a file; given again, it goes on where it was")
    run.add_argument("source", metavar="IN", help="JSONL, CSV or Parquet: a path, - for stdin, or s3://, gs://, az://")
    run.add_argument(
        "-o", "--output", metavar="OUT", required=True, help="where the answers go, as JSONL; - for stdout"
    )
    run.add_argument(
        "--errors",
        metavar="FILE",
        help="where lines without an answer go (default: OUT with .errors before its ending)",
    )
    run.add_argument("--overwrite", action="store_true", help="begin anew, whatever is in OUT")
    add_part_option(run)
    add_request_options(run)
    add_place_options(run, add_engine_options)

    resume = _command(kinds, "resume", _resume, "go on with a batch after any death; options replace those of `run`")
    resume.add_argument("target", metavar="OUT", help="the output that was asked for, or the folder of its state")
    add_place_options(resume, add_engine_options, is_resume=True)

    status = _command(kinds, "status", _status, "show how far a batch is")
    status.add_argument("target", metavar="OUT|ID", help="an output, or with --url a batch's id")
    status.add_argument("--json", action="store_true", help="print JSON")
    add_server_options(status)

    merge = _command(kinds, "merge", _merge, "join the parts that `run --part` made of an output")
    merge.add_argument("target", metavar="OUT", help="the output as it was given to `run --part`")
    merge.add_argument("--errors", metavar="FILE", help="as it was given to `run --part` (default: as there)")
    merge.add_argument("--parts", type=positive, metavar="N", help="how many there are (default: as their names say)")
    merge.add_argument("--overwrite", action="store_true", help="replace what is in OUT")
    merge.add_argument("--remove-parts", action="store_true", help="delete the parts once OUT is whole")

    cancel = _command(kinds, "cancel", _cancel, "end a batch; what is answered is kept")
    cancel.add_argument("target", metavar="OUT|ID", help="an output, or with --url a batch's id")
    add_server_options(cancel)


def _command(kinds: Any, name: str, run: Callable[[Namespace], None], about: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = kinds.add_parser(name, help=about, description=about.capitalize() + ".")
    parser.set_defaults(run=run)
    parser.add_argument(
        "--state-dir",
        type=Path,
        metavar="DIR",
        help="where a batch is remembered (default: OUT.tramontane beside OUT; for a storage, in XDG_STATE_HOME)",
    )
    parser.add_argument("--log-level", choices=LOG_LEVELS, default="warning", help="debug also shows tracebacks")
    return parser


def _run(args: Namespace) -> None:
    if args.url is not None and args.ray_address is not None:
        raise ConfigError("--url and --ray-address are two places for one batch; give one of them.")
    asked = job_of(args)
    folder = folder_for(asked.output, args.state_dir)
    if args.output == locations.STANDARD and args.state_dir is None:
        sys.stderr.write(f"This batch is remembered in {folder.path}.\n")
    with folder.hold():
        job = job_in(folder, asked, overwrite=args.overwrite)
        if job is None:
            make_way(asked, overwrite=args.overwrite)
            check_places(asked)
            folder.write(asked)
            job = asked
        elif job.outcome is None:
            sys.stderr.write("This batch has begun already; going on with it.\n")
        _go_on(folder, job, args)


def _resume(args: Namespace) -> None:
    folder, job = find_job(args.target, args.state_dir)
    with folder.hold():
        job = folder.read() or job  # whoever held it may have ended it
        _go_on(folder, job, args)


def _go_on(folder: JobFolder, job: Job, args: Namespace) -> None:
    """To the end, or to a sentence that says how to go on."""
    if job.outcome is None:
        given = {k: v for k, v in vars(args).items() if k not in NOT_KEPT}
        options = Namespace(**{**job.options, **{k: v for k, v in given.items() if v is not None}})
        options.log_level = args.log_level
        try:
            if job.url is not None:
                display = Display()
                try:
                    remote = RemoteBatches(args.url or job.url, api_key=args.api_key, ca_cert=_path(options.ca_cert))
                    job = run_there(folder, job, remote, display)
                finally:
                    display.close()
            else:
                from cluster.cli.batch.run_here import run_here

                job = run_here(folder, job, options, Console())
        except NoLinesError:  # a pool may have more jobs than the file has lines
            empty = Outcome(status="completed", num_lines=0, num_completed=0, num_failed=0)
            job = conclude(folder, job, empty, output=None, errors=None)
        except (
            KeyboardInterrupt,
            SystemExit,
            StoppedError,
        ):  # the second from the SIGTERM handler that ray.init installs
            raise StoppedError(f"Stopped. {_how_to_go_on(folder, folder.read() or job)}") from None
        except TramontaneError as e:
            if folder.read() is None:  # nothing was begun that could go on
                raise
            raise type(e)(f"{e}\n{_how_to_go_on(folder, folder.read() or job)}") from e
    sys.stderr.write(f"{summary(job)}\n")
    if (failed := failure(job)) is not None:
        raise failed


def _how_to_go_on(folder: JobFolder, job: Job) -> str:
    target = job.output if folder.path == folder_for(job.output, None).path else str(folder.path)
    where = f"the server at {job.url} works on; " if (job.url is not None and job.batch_id is not None) else ""
    text = f"Nothing is lost: {where}`tramontane batch resume {target}` goes on."
    if (address := job.options.get("ray_address")) is not None:
        text += f" Without it, `tramontane down --ray-address {address} --name {job.deployment}` removes what is left in Ray."
    return text


def _merge(args: Namespace) -> None:
    output = locations.absolute(args.target)
    errors, folder = errors_of(output, args.errors), folder_for(output, args.state_dir)
    if output == locations.STANDARD:
        raise ConfigError("Parts have names, which stdout has not; give the OUT that `run --part` was given.")
    with folder.hold():
        job = folder.read()
        if not args.overwrite and job is not None:
            raise ConfigError(
                f"{_how_to_go_on(folder, job) if job.outcome is None else summary(job)} Add --overwrite to replace it by its parts."
            )
        if not args.overwrite and locations.exists(output):
            raise ConfigError(f"{output} exists already; add --overwrite to replace it by its parts.")
        locations.check_writable(output)
        locations.check_writable(errors)
        try:
            job = merge(folder, output, errors, num_parts=args.parts)
        except TramontaneError:
            if folder.read() is None:  # nothing is to be remembered of it
                folder.clear(keep_job=False)
            raise
        if args.remove_parts:
            remove_parts(output, errors, num_parts=args.parts)
    sys.stderr.write(f"{summary(job)}\n")
    if (failed := failure(job)) is not None:
        raise failed


def _status(args: Namespace) -> None:
    if args.url is not None:
        batch = RemoteBatches(args.url, api_key=args.api_key, ca_cert=args.ca_cert).get(args.target)
        _tell(batch, remote_snapshot(batch, None), args)
        return
    try:
        folder, job = find_job(args.target, args.state_dir)
    except ConfigError:
        output = locations.absolute(args.target)
        if not (parts := status_of_parts(output)):
            raise
        _tell(parts, None, args, "\n".join(sentence(status, output) for status in parts))
        return
    if job.outcome is not None:
        _tell(job.outcome, None, args, summary(job))
    elif job.url is not None:
        if job.batch_id is None:
            _tell(None, None, args, _how_to_go_on(folder, job))
            return
        batch = RemoteBatches(job.url, api_key=args.api_key, ca_cert=_path(job.options["ca_cert"])).get(job.batch_id)
        _tell(batch, remote_snapshot(batch, None), args)
    else:
        from cluster.cli.batch.run_here import look_here
        from cluster.cli.batch.watch import snapshot_of

        record = look_here(folder, job)
        shown = None if record is None else snapshot_of(record, None)
        _tell(record, shown, args, "" if folder.is_held else f"No process works on it. {_how_to_go_on(folder, job)}")


def _tell(what: Any, snapshot: Snapshot | None, args: Namespace, note: str = "") -> None:
    if args.json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(what)).decode() + "\n")
        return
    words = []
    if snapshot is not None:
        meter = Meter()
        meter.look(snapshot, 0.0)
        words.append(f"{describe(snapshot, meter)}.".replace(", in_progress", ""))
        words[0] = f"{what.id}: {words[0]}"
    sys.stdout.write("\n".join([*words, *filter(None, [note])]) + "\n")


def _cancel(args: Namespace) -> None:
    if args.url is not None:
        batch = RemoteBatches(args.url, api_key=args.api_key, ca_cert=args.ca_cert).cancel(args.target)
        sys.stdout.write(f"{batch.id} is {batch.status}.\n")
        return
    folder, job = find_job(args.target, args.state_dir)
    if job.outcome is not None:
        raise RequestError(f"The batch is over. {summary(job)}")
    if job.url is not None:
        if job.batch_id is None:
            raise RequestError(f"The batch has not begun at {job.url}; delete {folder.path} to forget it.")
        remote = RemoteBatches(job.url, api_key=args.api_key, ca_cert=_path(job.options["ca_cert"]))
        sys.stdout.write(f"{job.batch_id} is {remote.cancel(job.batch_id).status}. {_how_to_go_on(folder, job)}\n")
        return
    from cluster.cli.batch.run_here import ask_to_end, end_here

    if folder.is_held:
        ask_to_end(folder, job)
        sys.stdout.write("The batch is being cancelled; the process that runs it writes what is answered, and ends.\n")
        return
    with folder.hold():
        try:
            job = end_here(folder, job)
        except RequestError:
            folder.clear(keep_job=False)
            raise
    sys.stdout.write(f"{summary(job)}\n")


def _path(text: str | Path | None) -> Path | None:
    return None if text is None else Path(text)
