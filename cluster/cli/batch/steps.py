"""The steps of a command's batch that are the same wherever its lines are answered: its lines are made, and its files put in their places.

Knows a job, its options, and the forms of its input; knows no store, no Ray and no HTTP. Every step may be repeated after any death.
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
    """The batch is over, and some lines have no answer: the error file says why."""


class NoLinesError(RequestError):
    """A part of a file that has no lines for it."""


class StoppedError(BatchError):
    """By Ctrl-C or SIGTERM. Nothing is lost."""


def template_of(request: dict[str, Any], model: str) -> LineTemplate:
    """What the options say of lines that do not say it themselves. Raises ConfigError."""
    columns = dict(_column(column) for column in request.get("columns") or ())
    custom_id = columns.pop("custom_id", None)
    if len(columns) > 1:
        raise ConfigError(
            f"--column is given for {' and '.join(columns)}; a line holds one of them: leave the others out."
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
    """A field and the text that makes it, with columns in braces. Raises ConfigError."""
    field, equals, value = option.partition("=")
    if not equals or not value or (field not in _FIELD_ENDPOINTS and field != "custom_id"):
        raise ConfigError(
            f"--column {option} is not understood; write --column prompt=NAME, messages=NAME, input=NAME or custom_id=NAME, or a text "
            "with columns in braces in NAME's place."
        )
    if "{" not in value and re.fullmatch(r"\w+", value) is None:
        raise ConfigError(
            f"--column {option}: only columns named with letters, digits and underscores can be used; rename it."
        )
    return field, value if "{" in value else f"{{{value}}}"


def format_of(request: dict[str, Any], source: str) -> Format:
    """Raises ConfigError where neither the option nor the name tells."""
    if (asked := request.get("format")) is not None:
        return asked
    return "jsonl" if source == locations.STANDARD else guess_format(locations.plain_name(source))


class Lines:
    """A job's requests as a batch file's bytes, read from its source while they are asked for. `endpoint` is known with the first chunk.

    Of a part, its own lines; the others are empty. Iterating raises RequestError, naming the row, ConfigError, and LocationError; and
    NoLinesError where the source has none for this part.
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
            for line in convert(source, format=self._format, template=self._template, holds=self._holds):
                if not self.endpoint:
                    self.endpoint = _endpoint_of(line)
                chunk += line
                if len(chunk) >= CHUNK_BYTES:
                    yield bytes(chunk)
                    chunk.clear()
            if chunk:
                yield bytes(chunk)
        if not self.endpoint and self._part is not None:
            raise NoLinesError(f"{self._job.source} holds no lines for part {self._part}.")
        if not self.endpoint:
            raise RequestError(f"{self._job.source} holds no lines.")

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """The same, read in a thread."""
        chunks = iter(self)
        while (chunk := await asyncio.to_thread(next, chunks, None)) is not None:
            yield chunk

    def _holds(self, number: int) -> bool:
        return self._part is None or self._part.holds(number)


def endpoint_of(path: Path) -> str:
    """Of a batch file that was made of `Lines`."""
    with path.open("rb") as file:
        return _endpoint_of(next((line for line in file if line.strip()), b""))


def _endpoint_of(line: bytes) -> str:
    try:
        endpoint = json.loads(line).get("url")
    except (ValueError, AttributeError):
        endpoint = None
    if endpoint not in ENDPOINTS:
        raise RequestError(f"The first line's 'url' is none of {', '.join(ENDPOINTS)}; a batch can only ask these.")
    return endpoint


def refused(source: str, errors: Sequence[LineError]) -> RequestError:
    """What a batch that failed before its start says of its lines."""
    shown = [f"line {e.line}: {e.message}" if e.line is not None else e.message for e in errors[:SHOWN_ERRORS]]
    words = [f"Nothing was run: {source} is not in order.", *shown]
    if len(errors) > SHOWN_ERRORS:
        words.append(f"and {len(errors) - SHOWN_ERRORS} errors more")
    return RequestError("\n  ".join(words))


def conclude(folder: JobFolder, job: Job, outcome: Outcome, *, output: Path | None, errors: Path | None) -> Job:
    """Puts the files in their places, remembers how it ended, and only then forgets the rest. Raises LocationError and StoreError.

    The output comes after the errors, and a part's record after both: what is there tells that the others are.
    """
    job = msgspec.structs.replace(job, outcome=msgspec.structs.replace(outcome, ended_at=time.time()))
    with tempfile.TemporaryDirectory() as temporary:
        made = Path(temporary) / "made"
        if errors is not None:
            locations.deliver(errors, job.errors)
        elif locations.exists(job.errors):  # of the batch that was there before
            locations.remove(job.errors)
        made.touch()
        locations.deliver(output or made, job.output)
        if part_of(job) is not None:
            made.write_bytes(msgspec.json.encode(record_of(job)))
            locations.deliver(made, record_location(job))
    folder.write(job)
    folder.clear(keep_job=True)
    return job


def summary(job: Job) -> str:
    """Of a job that is over."""
    outcome = job.outcome
    assert outcome is not None, "the job is not over"
    took = duration(outcome.ended_at - job.created_at)
    text = f"{outcome.num_completed:,} of {outcome.num_lines:,} lines answered in {took}, in {_shown(job.output)}."
    if outcome.status != "completed":
        text = f"The batch is {outcome.status}: {text}"
    return text


def failure(job: Job) -> LinesFailedError | None:
    """What is to be said of lines without an answer."""
    outcome = job.outcome
    if outcome is None or outcome.num_failed == 0:
        return None
    lines = f"{outcome.num_failed:,} of {outcome.num_lines:,} lines"
    return LinesFailedError(f"{lines} have no answer; {_shown(job.errors)} says why, each with its custom_id.")


def _shown(location: str) -> str:
    return "the standard output" if location == locations.STANDARD else location
