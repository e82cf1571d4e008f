"""The steps of a batch command that do not depend on where its lines are answered: making its lines, and delivering its files.

Knows a job, its options, and the formats of its input. Knows no store, no Ray and no HTTP. Every step may be repeated after a crash.
"""

import asyncio
import json
import re
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from cluster.batch.errors import BatchError
from cluster.batch.records import ENDPOINTS, LineError
from cluster.cli.batch import locations
from cluster.cli.batch.convert import Format, LineTemplate, convert, guess_format
from cluster.cli.batch.job import Job, JobFolder, Outcome
from cluster.cli.batch.parts.records import part_of, record_location, record_of
from cluster.cli.batch.progress import duration
from workers.errors import ConfigError, RequestError

CHUNK_BYTES = 1024 * 1024
SHOWN_ERRORS = 10
_FIELD_ENDPOINTS = {"prompt": "/v1/completions", "messages": "/v1/chat/completions", "input": "/v1/embeddings"}


class LinesFailedError(BatchError):
    """The batch has ended and some lines have no answer. The error file says why."""


class NoLinesError(RequestError):
    """The input has no lines for this part."""


class StoppedError(BatchError):
    """Stopped by Ctrl-C or SIGTERM. Nothing is lost."""


def template_of(request: dict[str, Any], model: str) -> LineTemplate:
    """The values for rows that do not set them, from the options. Raises ConfigError."""
    columns = dict(_column(column) for column in request.get("columns") or ())
    custom_id = columns.pop("custom_id", None)
    if len(columns) > 1:
        raise ConfigError(
            f"--column is given for {' and '.join(columns)}, but a line has only one of them.",
            remedy="Leave the others out.",
            param="--column",
        )
    field, text = next(iter(columns.items()), (None, None))
    return LineTemplate(
        model=model,
        endpoint=request.get("endpoint") or _FIELD_ENDPOINTS.get(field or ""),
        defaults=request.get("defaults") or {},
        text=text,
        custom_id=custom_id,
    )


def _column(option: str) -> tuple[str, str]:
    """(field, template with columns in braces) of one --column. Raises ConfigError."""
    field, equals, value = option.partition("=")
    if not equals or not value or (field not in _FIELD_ENDPOINTS and field != "custom_id"):
        raise ConfigError(
            f"--column {option} is not a field and a column.",
            remedy="Write --column prompt=NAME, messages=NAME, input=NAME or custom_id=NAME; NAME may be a text with columns in braces.",
            param="--column",
        )
    if "{" not in value and re.fullmatch(r"\w+", value) is None:
        raise ConfigError(
            f"--column {option}: the column's name has characters other than letters, digits and underscores.",
            remedy="Rename the column.",
            param="--column",
        )
    return field, value if "{" in value else f"{{{value}}}"


def format_of(request: dict[str, Any], source: str) -> Format:
    """The input's format, from the option or the name. Raises ConfigError if neither says it."""
    if (given := request.get("format")) is not None:
        return given
    return "jsonl" if source == locations.STANDARD else guess_format(locations.plain_name(source))


class Lines:
    """A job's requests in the format of a batch file, read from its source on demand. `endpoint` is known after the first chunk.

    For a part, only the lines of the part; the others are empty. Iterating raises RequestError (which names the row), ConfigError,
    LocationError, and NoLinesError if the source has no lines for this part.
    """

    def __init__(self, job: Job, *, model: str) -> None:
        self.endpoint = ""
        self._job = job
        self._template = template_of(job.request, model)
        self._format = format_of(job.request, job.source)
        self._part = part_of(job)

    def __iter__(self) -> Iterator[bytes]:
        """Chunks of whole lines."""
        with locations.reading(self._job.source, seekable=self._format == "parquet") as source:
            chunk = bytearray()
            for line in convert(source, format=self._format, template=self._template, is_wanted=self._is_wanted):
                if not self.endpoint:
                    self.endpoint = _endpoint_of(line)
                chunk += line
                if len(chunk) >= CHUNK_BYTES:
                    yield bytes(chunk)
                    chunk.clear()
            if chunk:
                yield bytes(chunk)
        if not self.endpoint and self._part is not None:
            raise NoLinesError(f"{self._job.source} has no lines for part {self._part}.")
        if not self.endpoint:
            raise RequestError(f"{self._job.source} has no lines.")

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """The same, read in a thread."""
        chunks = iter(self)
        while (chunk := await asyncio.to_thread(next, chunks, None)) is not None:
            yield chunk

    def _is_wanted(self, number: int) -> bool:
        return self._part is None or self._part.contains(number)


def endpoint_of(path: Path) -> str:
    """The endpoint of a batch file that was made from `Lines`."""
    with path.open("rb") as file:
        return _endpoint_of(next((line for line in file if line.strip()), b""))


def _endpoint_of(line: bytes) -> str:
    try:
        endpoint = json.loads(line).get("url")
    except (ValueError, AttributeError):
        endpoint = None
    if endpoint not in ENDPOINTS:
        raise RequestError(f"The 'url' of the first line is not one of {', '.join(ENDPOINTS)}.", param="url")
    return endpoint


def validation_error(source: str, errors: Sequence[LineError]) -> RequestError:
    """The exception for a batch that failed validation, with its first errors."""
    shown = [f"line {e.line}: {e.message}" if e.line is not None else e.message for e in errors[:SHOWN_ERRORS]]
    words = [f"Nothing was run: {source} has invalid lines.", *shown]
    if len(errors) > SHOWN_ERRORS:
        words.append(f"and {len(errors) - SHOWN_ERRORS} more errors")
    return RequestError("\n  ".join(words))


def finish(folder: JobFolder, job: Job, outcome: Outcome, *, output: Path | None, errors: Path | None) -> Job:
    """Delivers the files, records how the batch ended, and then removes everything else. Raises LocationError and StoreError.

    The output is delivered after the errors, and a part's record after both, so that each vouches for those before it.
    """
    job = msgspec.structs.replace(job, outcome=msgspec.structs.replace(outcome, ended_at=time.time()))
    with tempfile.TemporaryDirectory() as temporary:
        staged = Path(temporary) / "staged"
        if errors is not None:
            locations.deliver(errors, job.errors)
        elif locations.exists(job.errors):  # of the batch that had this output before
            locations.remove(job.errors)
        staged.touch()
        locations.deliver(output or staged, job.output)
        if part_of(job) is not None:
            staged.write_bytes(msgspec.json.encode(record_of(job)))
            locations.deliver(staged, record_location(job))
    folder.write(job)
    folder.clear(keep_job=True)
    return job


def summary(job: Job) -> str:
    """One line about a job that has ended."""
    outcome = job.outcome
    assert outcome is not None, "the job has not ended"
    took = duration(outcome.ended_at - job.created_at)
    text = (
        f"{outcome.num_completed:,} of {outcome.num_lines:,} lines answered in {took}, written to {_shown(job.output)}."
    )
    if outcome.status != "completed":
        text = f"The batch is {outcome.status}: {text}"
    return text


def failed_lines_error(job: Job) -> LinesFailedError | None:
    """The exception if lines have no answer, else None."""
    outcome = job.outcome
    if outcome is None or outcome.num_failed == 0:
        return None
    lines = f"{outcome.num_failed:,} of {outcome.num_lines:,} lines"
    return LinesFailedError(
        f"{lines} have no answer.", remedy=f"See {_shown(job.errors)}, which lists the reason for each custom_id."
    )


def _shown(location: str) -> str:
    return "standard output" if location == locations.STANDARD else location
