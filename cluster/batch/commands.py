"""`tramontane batch run`, `resume`, `status` and `cancel`: their options and what they print.

Three places can answer the lines: a Ray of the command's own, one that runs (--ray-address), and a server (--url). A job is one output;
its folder remembers all that was asked, without the key. Knows which step follows which, and nothing of how it is done.
"""

import argparse
import json
import sys
from argparse import SUPPRESS, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from cluster.batch import locations
from cluster.batch.convert import FORMATS
from cluster.batch.job import Job, JobFolder, find_job, folder_for, new_job, version_of
from cluster.batch.progress import Display, Meter, Snapshot, describe
from cluster.batch.records import ENDPOINTS, new_batch_id, new_file_id, parse_window
from cluster.batch.remote import RemoteBatches, run_there
from cluster.batch.remote import snapshot_of as remote_snapshot
from cluster.batch.steps import StoppedError, failure, format_of, summary, template_of
from cluster.config import API_KEY_ENV, parse_replicas
from cluster.console import Console
from cluster.log import LOG_LEVELS
from workers.errors import ConfigError, RequestError, TramontaneError

AddOptions = Callable[[argparse.ArgumentParser], None]
REQUEST_FIELDS = ("model", "revision", "served_model_name", "chat_template", "endpoint", "format", "column", "defaults")
NOT_KEPT = ("run", "api_key", "log_level", "source", "output", "errors", "state_dir", "overwrite", "target", "json")
DEFAULT_ERRORS = "batch.errors.jsonl"  # for an output that has no name of its own


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
    _add_request_options(run)
    _add_place_options(run, add_engine_options)

    resume = _command(kinds, "resume", _resume, "go on with a batch after any death; options replace those of `run`")
    resume.add_argument("target", metavar="OUT", help="the output that was asked for, or the folder of its state")
    _add_place_options(resume, add_engine_options, is_resume=True)

    status = _command(kinds, "status", _status, "show how far a batch is")
    status.add_argument("target", metavar="OUT|ID", help="an output, or with --url a batch's id")
    status.add_argument("--json", action="store_true", help="print JSON")
    _add_server_options(status)

    cancel = _command(kinds, "cancel", _cancel, "end a batch; what is answered is kept")
    cancel.add_argument("target", metavar="OUT|ID", help="an output, or with --url a batch's id")
    _add_server_options(cancel)


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


def _add_request_options(parser: argparse.ArgumentParser) -> None:
    asked = parser.add_argument_group("what is asked", "of lines that do not say it themselves")
    asked.add_argument(
        "--model", metavar="MODEL", help="folder or Hub id (default: the demo model); with --url its served name"
    )
    asked.add_argument("--revision", help="branch, tag or commit on the Hub")
    asked.add_argument("--served-model-name", metavar="NAME", help="the model's name in the lines (default: MODEL)")
    asked.add_argument("--chat-template", default="auto", metavar="NAME", help="as for `serve`")
    asked.add_argument("--format", choices=FORMATS, help="of IN (default: as its name ends)")
    asked.add_argument("--endpoint", choices=ENDPOINTS, help="default: as the lines' fields suggest")
    asked.add_argument(
        "--column",
        metavar="FIELD=NAME",
        help="prompt=, messages= or input= and a column's name, or a text with columns in it: 'prompt=Translate: {text}'",
    )
    asked.add_argument("--max-tokens", type=int, metavar="N")
    asked.add_argument("--temperature", type=float, metavar="T")
    asked.add_argument("--top-p", type=float, metavar="P")
    asked.add_argument("--seed", type=int, metavar="N", help="default: one of each line's own")
    asked.add_argument(
        "--set",
        action="append",
        metavar="FIELD=VALUE",
        help="any other field, in JSON: --set top_k=40; may be repeated",
    )


def _add_server_options(parser: argparse.ArgumentParser) -> Any:
    server = parser.add_argument_group("server")
    server.add_argument("--url", metavar="URL", help="a running server, which then answers the lines")
    server.add_argument("--api-key", help=f"the server's key; better given as {API_KEY_ENV}")
    server.add_argument(
        "--ca-cert", type=Path, metavar="FILE", help="certificate to trust, where https uses one of your own"
    )
    return server


def _add_place_options(
    parser: argparse.ArgumentParser, add_engine_options: AddOptions, *, is_resume: bool = False
) -> None:
    _add_server_options(parser)
    before = {action.dest for action in parser._actions}
    cluster = parser.add_argument_group("cluster", "without --url")
    cluster.add_argument("--ray-address", metavar="ADDRESS", help="Ray cluster to join (default: start one here)")
    cluster.add_argument(
        "--replicas",
        type=_replicas,
        metavar="N|MIN:MAX",
        help="copies of the model (default: 1; in a Ray that is joined 0:1, or 0: and --max-replicas)",
    )
    cluster.add_argument("--max-replicas", type=_positive, metavar="N", help="most copies that the batch may have")
    cluster.add_argument("--tensor-parallel-size", "-tp", type=_positive, default=1, metavar="N", help="ranks of each")
    if not is_resume:
        cluster.add_argument(
            "--deadline",
            type=_window,
            metavar="TIME",
            help="such as 2h: replicas are added to keep it, and lines not answered by then are given up "
            "(default: none; on a server 24h)",
        )
    add_engine_options(parser)
    if is_resume:  # what is not given again is as it was
        for action in parser._actions:
            if action.dest not in before:
                action.default = SUPPRESS


def _run(args: Namespace) -> None:
    folder = folder_for(args.output, args.state_dir)
    if args.url is not None and args.ray_address is not None:
        raise ConfigError("--url and --ray-address are two places for one batch; give one of them.")
    asked = _job_of(args)
    if args.output == locations.STANDARD and args.state_dir is None:
        sys.stderr.write(f"This batch is remembered in {folder.path}.\n")
    with folder.hold():
        job = _same(folder, asked, overwrite=args.overwrite)
        if job is None:
            if locations.exists(asked.output) and not args.overwrite:
                raise ConfigError(f"{asked.output} exists already; name another output, or add --overwrite.")
            _check_places(asked)
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
                from cluster.batch_run import run_here

                job = run_here(folder, job, options, Console())
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


def _status(args: Namespace) -> None:
    if args.url is not None:
        batch = RemoteBatches(args.url, api_key=args.api_key, ca_cert=args.ca_cert).get(args.target)
        _tell(batch, remote_snapshot(batch, None), args)
        return
    folder, job = find_job(args.target, args.state_dir)
    if job.outcome is not None:
        _tell(job.outcome, None, args, summary(job))
    elif job.url is not None:
        if job.batch_id is None:
            _tell(None, None, args, _how_to_go_on(folder, job))
            return
        batch = RemoteBatches(job.url, api_key=args.api_key, ca_cert=_path(job.options["ca_cert"])).get(job.batch_id)
        _tell(batch, remote_snapshot(batch, None), args)
    else:
        from cluster.batch_run import look_here, snapshot_of

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
    from cluster.batch_run import ask_to_end, end_here

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


def _job_of(args: Namespace) -> Job:
    """What is asked for. Raises ConfigError."""
    options = {k: v for k, v in vars(args).items() if k not in (*NOT_KEPT, *REQUEST_FIELDS, "set")}
    for name in ("max_tokens", "temperature", "top_p", "seed"):
        options.pop(name)
    if args.ca_cert is not None:
        options["ca_cert"] = str(args.ca_cert.absolute())
    is_ours = args.url is None
    model = args.model
    if is_ours and model is not None and locations.local_path(model).is_dir():
        model = str(locations.local_path(model).absolute())
    request = {name: getattr(args, name, None) for name in REQUEST_FIELDS}
    request |= {"model": model, "defaults": _defaults(args)}
    source, output = locations.absolute(args.source), locations.absolute(args.output)
    errors = args.errors
    if errors is None:
        errors = DEFAULT_ERRORS if output == locations.STANDARD else locations.with_suffix(output, ".errors")
    template_of(request, "")
    format_of(request, source)
    return new_job(
        source=source,
        source_version=version_of(source),
        output=output,
        errors=locations.absolute(errors),
        request=request,
        options=json.loads(json.dumps(options, default=str)),
        url=args.url,
        batch_id=new_batch_id() if is_ours else None,
        input_file_id=new_file_id() if is_ours else None,
    )


def _defaults(args: Namespace) -> dict[str, Any]:
    defaults: dict[str, Any] = {}
    for pair in args.set or ():
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise ConfigError(f"--set {pair} is not understood; write FIELD=VALUE, as in --set top_k=40.")
        try:
            defaults[name] = json.loads(value)
        except ValueError:
            defaults[name] = value  # a word needs no quotes
    given = {name: getattr(args, name) for name in ("max_tokens", "temperature", "top_p", "seed")}
    return defaults | {name: value for name, value in given.items() if value is not None}


def _same(folder: JobFolder, asked: Job, *, overwrite: bool) -> Job | None:
    """The job that this output has already, if it is the one that is asked for. Raises ConfigError if it is another."""
    job = folder.read()
    if job is None or overwrite:
        folder.clear(keep_job=True)
        return None
    if job.outcome is not None:
        if not locations.exists(job.output):  # somebody took it away: it may be asked for again
            folder.clear(keep_job=True)
            return None
        raise ConfigError(f"{summary(job)} Name another output, or add --overwrite to begin anew.")
    same = (job.source, job.request, job.url) == (asked.source, asked.request, asked.url)
    if not same:
        raise ConfigError(
            f"A batch of {job.source} with this output has begun and asks for something else; `tramontane batch resume {job.output}` "
            "goes on with it, --overwrite drops it."
        )
    if job.source_version != asked.source_version:
        raise ConfigError(
            f"{job.source} has changed since its batch began; `tramontane batch resume {job.output}` goes on with what it held "
            "then, --overwrite begins anew."
        )
    return job


def _check_places(job: Job) -> None:
    """Before hours of work are spent."""
    if job.source != locations.STANDARD and not locations.exists(job.source):
        raise ConfigError(f"{job.source} is not there; name a file to read.")
    locations.check_writable(job.output)
    locations.check_writable(job.errors)


def _path(text: str | Path | None) -> Path | None:
    return None if text is None else Path(text)


def _window(text: str) -> str:
    try:
        parse_window(text)
    except RequestError as e:
        raise argparse.ArgumentTypeError(f"{text!r}: write a number and a unit, s, m, h or d, such as 2h") from e
    return text


def _replicas(text: str) -> tuple[int, int]:
    try:
        return parse_replicas(text)
    except ValueError as e:
        raise argparse.ArgumentTypeError(str(e)) from e


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value
