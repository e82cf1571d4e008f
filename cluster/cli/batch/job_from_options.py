"""What a command's options ask for, as a Job; and whether it is what the output's folder remembers already.

Knows options, locations and folders; runs nothing.
"""

import json
from argparse import Namespace
from typing import Any

from cluster.batch.records import new_batch_id, new_file_id
from cluster.cli.batch import locations
from cluster.cli.batch.job import Job, JobFolder, new_job, version_of
from cluster.cli.batch.parts.records import finished, record_location
from cluster.cli.batch.steps import format_of, summary, template_of
from workers.errors import ConfigError

REQUEST_FIELDS = (
    "model",
    "revision",
    "served_model_name",
    "chat_template",
    "endpoint",
    "format",
    "columns",
    "defaults",
    "part",
)
NOT_KEPT = ("run", "api_key", "log_level", "source", "output", "errors", "state_dir", "overwrite", "target", "json")
DEFAULT_ERRORS = "batch.errors.jsonl"  # for an output that has no name of its own


def job_of(args: Namespace) -> Job:
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
    part = args.part
    request |= {"model": model, "defaults": _defaults(args), "part": None if part is None else str(part)}
    source, output = locations.absolute(args.source), locations.absolute(args.output)
    errors = errors_of(output, args.errors)
    if part is not None:
        if output == locations.STANDARD:
            raise ConfigError("--part writes several files, which stdout cannot be; name an output.")
        output, errors = part.location(output), part.location(errors)
        _check_source(source)  # its size is asked for below
    template_of(request, "")
    format_of(request, source)
    return new_job(
        source=source,
        source_version=version_of(source),
        source_bytes=None if part is None else locations.num_bytes(source),
        output=output,
        errors=errors,
        request=request,
        options=json.loads(json.dumps(options, default=str)),
        url=args.url,
        batch_id=new_batch_id() if is_ours else None,
        input_file_id=new_file_id() if is_ours else None,
    )


def errors_of(output: str, errors: str | None) -> str:
    """Where lines without an answer go."""
    if errors is not None:
        return locations.absolute(errors)
    return locations.absolute(
        DEFAULT_ERRORS if output == locations.STANDARD else locations.with_suffix(output, ".errors")
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


def job_in(folder: JobFolder, asked: Job, *, overwrite: bool) -> Job | None:
    """The job that this output has already, if it is the one that is asked for. Raises ConfigError if it is another.

    A part may be whole without being known here: pools give a job to another machine, and start one again that has ended.
    """
    job, is_part = folder.read(), asked.request["part"] is not None
    if job is None or overwrite or (is_part and job.outcome is not None):
        folder.clear(keep_job=True)
        done = finished(asked) if is_part and not overwrite else None
        if done is not None:
            folder.write(done)
        return done
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


def check_places(job: Job) -> None:
    """Before hours of work are spent."""
    _check_source(job.source)
    locations.check_writable(job.output)
    locations.check_writable(job.errors)


def _check_source(source: str) -> None:
    if source != locations.STANDARD and not locations.exists(source):
        raise ConfigError(f"{source} is not there; name a file to read.")


def make_way(job: Job, *, overwrite: bool) -> None:
    """For the output of a job that begins. Raises ConfigError where another's is in its place, and LocationError.

    A part's output without a record is what a job that was cut off left, maybe on another machine.
    """
    if job.request["part"] is None and not overwrite and locations.exists(job.output):
        raise ConfigError(f"{job.output} exists already; name another output, or add --overwrite.")
    if job.request["part"] is not None and locations.exists(record_location(job)):
        locations.remove(record_location(job))  # before anything else: it vouches for what is replaced now
