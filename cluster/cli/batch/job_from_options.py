"""Makes a Job from the options of `batch run`, and compares it with the job that the output's folder remembers.

Knows options, locations and folders. Runs nothing.
"""

import json
from argparse import Namespace
from typing import Any

from cluster.batch.records import new_batch_id, new_file_id
from cluster.cli.batch import locations
from cluster.cli.batch.job import Job, JobFolder, new_job, version_of
from cluster.cli.batch.parts.records import finished, record_location
from cluster.cli.batch.steps import format_of, summary, template_of
from cluster.config.serve import ServeConfig
from workers.errors import ConfigError

REQUEST_FIELDS = (
    "model",
    "revision",
    "gguf_file",
    "served_model_name",
    "chat_template",
    "generation_config",
    "endpoint",
    "format",
    "columns",
    "defaults",
    "part",
)
OF_MODEL = ("chat_template", "generation_config", "revision", "gguf_file", "served_model_name")
NOT_KEPT = ("run", "api_key", "log_level", "source", "output", "errors", "state_dir", "overwrite", "target", "json")
DEFAULT_ERRORS = "batch.errors.jsonl"  # for an output on stdout


def job_from_options(args: Namespace) -> Job:
    """The requested job. Raises ConfigError."""
    options = {k: v for k, v in vars(args).items() if k not in (*NOT_KEPT, *REQUEST_FIELDS, "set")}
    for name in ("max_tokens", "temperature", "top_p", "seed"):
        options.pop(name)
    if args.ca_cert is not None:
        options["ca_cert"] = str(args.ca_cert.absolute())
    runs_here = args.url is None
    if not runs_here:
        _check_for_server(args)
    model = args.model
    if runs_here and model is not None and locations.local_path(model).exists():
        model = str(locations.local_path(model).absolute())
    request = {name: getattr(args, name, None) for name in REQUEST_FIELDS}
    # So that the request equals that of a release without these options.
    if request["generation_config"] == ServeConfig.generation_config:
        del request["generation_config"]
    if request["gguf_file"] is None:
        del request["gguf_file"]
    part = args.part
    request |= {"model": model, "defaults": _defaults(args), "part": None if part is None else str(part)}
    source, output = locations.absolute(args.source), locations.absolute(args.output)
    errors = errors_location(output, args.errors)
    if part is not None:
        if output == locations.STANDARD:
            raise ConfigError(
                "--part writes several files, which cannot go to standard output.",
                remedy="Give the path of an output.",
                param="--output",
            )
        output, errors = part.location(output), part.location(errors)
        _check_source(source)  # its size is read below
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
        batch_id=new_batch_id() if runs_here else None,
        input_file_id=new_file_id() if runs_here else None,
    )


def _check_for_server(args: Namespace) -> None:
    """Raises ConfigError for an option that says how a model is loaded, which a server has done."""
    for name in OF_MODEL:
        if getattr(args, name, None) not in (None, ServeConfig.generation_config):
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(
                f"{option} has no effect with --url: the server has its own.",
                remedy=f"Leave it out, or start the server with {option}.",
                param=option,
            )


def errors_location(output: str, errors: str | None) -> str:
    """Where lines without an answer go. errors: the option, None for the default."""
    if errors is not None:
        return locations.absolute(errors)
    return locations.absolute(
        DEFAULT_ERRORS if output == locations.STANDARD else locations.with_suffix(output, ".errors")
    )


def _defaults(args: Namespace) -> dict[str, Any]:
    given = {name: getattr(args, name) for name in ("max_tokens", "temperature", "top_p", "seed")}
    return dict(args.set or ()) | {name: value for name, value in given.items() if value is not None}


def existing_job(folder: JobFolder, requested: Job, *, overwrite: bool) -> Job | None:
    """The job that this output already has, or None. Raises ConfigError if it differs from the requested one.

    A part may be complete without a job on this machine: a pool may move a job to another machine, or restart one that has ended.
    """
    job, is_part = folder.read(), requested.request["part"] is not None
    if job is None or overwrite or (is_part and job.outcome is not None):
        folder.clear(keep_job=True)
        done = finished(requested) if is_part and not overwrite else None
        if done is not None:
            folder.write(done)
        return done
    if job.outcome is not None:
        if not locations.exists(job.output):  # the output was moved or deleted: it may be computed again
            folder.clear(keep_job=True)
            return None
        raise ConfigError(
            summary(job), remedy="Choose another output, or start over with --overwrite.", param="--overwrite"
        )
    same = (job.source, job.request, job.url) == (requested.source, requested.request, requested.url)
    if not same:
        raise ConfigError(
            f"This output belongs to a batch of {job.source} that was started with other options.",
            remedy=f"Continue that batch with `tramontane batch resume {job.output}`, or drop it with --overwrite.",
            param="--overwrite",
        )
    if job.source_version != requested.source_version:
        raise ConfigError(
            f"{job.source} has changed since its batch was started.",
            remedy=f"Continue with the old contents with `tramontane batch resume {job.output}`, or start over with --overwrite.",
            param="--overwrite",
        )
    return job


def check_locations(job: Job) -> None:
    """Checks input and outputs before hours of work are spent. Raises ConfigError and LocationError."""
    _check_source(job.source)
    locations.check_writable(job.output)
    locations.check_writable(job.errors)


def _check_source(source: str) -> None:
    if source != locations.STANDARD and not locations.exists(source):
        raise ConfigError(f"{source} does not exist.", remedy="Give the path of an existing file.")


def prepare_output(job: Job, *, overwrite: bool) -> None:
    """Prepares the output's location for a new job. Raises ConfigError if the output exists, and LocationError.

    The output of a part without a record was left by an interrupted job, perhaps on another machine; it may be replaced.
    """
    if job.request["part"] is None and not overwrite and locations.exists(job.output):
        raise ConfigError(
            f"{job.output} already exists.", remedy="Choose another output, or add --overwrite.", param="--overwrite"
        )
    if job.request["part"] is not None and locations.exists(record_location(job)):
        locations.remove(record_location(job))  # first: it says that the files that are replaced now are complete
