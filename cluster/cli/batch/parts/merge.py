"""Joins the parts of an output: checks that all are complete and that no custom_id occurs twice, and restores the input's line order.

Streams; the custom_ids seen so far are in a small database in the job's folder. Knows records and files; lines.py knows how the lines of
a part are numbered.
"""

import contextlib
import heapq
import shutil
import sqlite3
from collections.abc import Mapping
from pathlib import Path

from cluster.batch.errors import BatchError, StoreError
from cluster.cli.batch import locations
from cluster.cli.batch.job import Job, JobFolder, Outcome, folder_for, new_job
from cluster.cli.batch.parts.lines import PartLine, lines_of
from cluster.cli.batch.parts.records import Part, PartRecord, find_parts, read_records
from cluster.cli.batch.steps import finish
from cluster.system.descriptors import raise_limit
from workers.errors import ConfigError, RequestError

SHOWN_PARTS = 10
SPARE_FILES = 64  # open files besides those of the parts


def merge(folder: JobFolder, output: str, errors: str, *, num_parts: int | None = None) -> Job:
    """Writes both files. The caller has the folder's lock. num_parts: None to read it from the parts' names.

    Raises BatchError for a part that is missing or does not match, ConfigError, LocationError and StoreError.
    """
    records = _complete_parts(output, num_parts)
    outcome = _outcome_of([record.outcome for record in records.values()])
    first = records[min(records)]
    if outcome.num_lines == 0:
        raise RequestError(f"{first.source} has no lines.")
    work = folder.path / "merge"
    try:
        shutil.rmtree(work, ignore_errors=True)  # files of an interrupted merge
        work.mkdir(parents=True)
        num_errors = _write(records, output, errors, work)
    except (OSError, sqlite3.Error) as e:
        raise StoreError(
            f"The folder {work} cannot be written: {getattr(e, 'strerror', None) or e}.",
            remedy="The parts are unchanged.",
        ) from e
    job = new_job(
        source=first.source,
        source_version=None,
        output=output,
        errors=errors,
        request={**first.request, "part": None},
        options={},
        created_at=min(record.created_at for record in records.values()),
    )
    return finish(
        folder,
        job,
        outcome,
        output=work / "output",
        errors=work / "errors" if num_errors else None,
    )


def remove_parts(output: str, errors: str, *, num_parts: int | None = None) -> None:
    """Deletes the parts of a merged output and their job folders on this machine. Raises LocationError and StoreError."""
    for part in find_parts(output):
        if num_parts not in (None, part.count):
            continue
        of_part = part.location(output)
        for location in (part.record_location(output), of_part, part.location(errors)):
            locations.remove(location)
        folder_for(of_part, None).clear(keep_job=False)


def _complete_parts(output: str, num_parts: int | None) -> dict[Part, PartRecord]:
    """The records of all parts. Raises BatchError if one is missing or was computed from something else, and ConfigError."""
    found = find_parts(output)
    counts = sorted({part.count for part in found}) if num_parts is None else [num_parts]
    if not counts:
        raise ConfigError(
            f"There are no parts of {output}.",
            remedy=f"Run `tramontane batch run IN -o {output} --part I/N` for each I from 0 to N-1.",
        )
    if len(counts) > 1:
        given = " and ".join(f"{count:,}" for count in counts)
        raise ConfigError(
            f"{output} has parts from more than one split, into {given} parts.",
            remedy="Choose one with --parts N.",
            param="--parts",
        )
    records = read_records(output, counts[0], found)
    if missing := [part for index in range(counts[0]) if (part := Part(index, counts[0])) not in records]:
        names = ", ".join(str(part) for part in missing[:SHOWN_PARTS])
        names += f" and {len(missing) - SHOWN_PARTS:,} more" if len(missing) > SHOWN_PARTS else ""
        source = next((record.source for record in records.values()), "IN")
        raise BatchError(
            f"{output} is missing part{'s' * (len(missing) > 1)} {names}.",
            remedy=f"Run or continue it with `tramontane batch run {source} -o {output} --part {missing[0]}`.",
        )
    _check_alike(records)
    return records


def _check_alike(records: Mapping[Part, PartRecord]) -> None:
    first = min(records)
    for part, record in records.items():
        if {**record.request, "part": None} != {**records[first].request, "part": None}:
            raise BatchError(
                f"Part {part} was run with other options than part {first}.",
                remedy="Run it again with --overwrite and the same options.",
            )
        sizes = (record.source_bytes, records[first].source_bytes)
        if None not in sizes and sizes[0] != sizes[1]:
            raise BatchError(
                f"{record.source} had a different size for part {part} than for part {first}.",
                remedy="Run the parts of the wrong version again with --overwrite.",
            )


def _outcome_of(outcomes: list[Outcome]) -> Outcome:
    statuses = {outcome.status for outcome in outcomes}
    return Outcome(
        status=next((status for status in ("cancelled", "expired") if status in statuses), "completed"),
        num_lines=sum(o.num_lines for o in outcomes),
        num_completed=sum(o.num_completed for o in outcomes),
        num_failed=sum(o.num_failed for o in outcomes),
        num_prompt_tokens=sum(o.num_prompt_tokens for o in outcomes),
        num_output_tokens=sum(o.num_output_tokens for o in outcomes),
    )


def _write(records: Mapping[Part, PartRecord], output: str, errors: str, work: Path) -> int:
    """Writes the merged files into the folder `work`. Returns how many lines are errors."""
    raise_limit(2 * len(records) + SPARE_FILES)
    num_errors = 0
    with contextlib.ExitStack() as stack:
        streams = []
        for part, record in records.items():
            answers, failures = part.location(output), part.location(errors) if record.outcome.num_failed else None
            lines = lines_of(
                part,
                record,
                output=_local(answers, work / f"{part.index}.output"),
                errors=None if failures is None else _local(failures, work / f"{part.index}.errors"),
            )
            streams.append(stack.enter_context(contextlib.closing(lines)))
        seen = stack.enter_context(_Seen(work / "custom_ids.db"))
        answered = stack.enter_context((work / "output").open("wb"))
        failed = stack.enter_context((work / "errors").open("wb"))
        for line in heapq.merge(*streams, key=lambda line: line.number):
            seen.add(line)
            (failed if line.is_error else answered).write(line.data)
            num_errors += line.is_error
    return num_errors


def _local(location: str, copy: Path) -> Path:
    """A local file to read line by line. Objects are copied: hundreds of open ones would each be buffered in memory."""
    if not locations.is_address(location):
        return locations.local_path(location)
    locations.fetch(location, copy)
    return copy


class _Seen:
    """The custom_ids of all lines so far, on disk."""

    def __init__(self, path: Path) -> None:
        self._db = sqlite3.connect(path, isolation_level=None)
        self._db.execute("PRAGMA journal_mode = OFF")  # the next merge starts over after a crash
        self._db.execute("PRAGMA synchronous = OFF")
        self._db.execute("CREATE TABLE seen (custom_id TEXT PRIMARY KEY, number INTEGER) WITHOUT ROWID")
        self._db.execute("BEGIN")

    def __enter__(self) -> "_Seen":
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()

    def add(self, line: PartLine) -> None:
        """Raises BatchError if another line has the same custom_id."""
        try:
            self._db.execute("INSERT INTO seen VALUES (?, ?)", (line.custom_id, line.number))
        except sqlite3.IntegrityError as e:
            found = self._db.execute("SELECT number FROM seen WHERE custom_id = ?", (line.custom_id,)).fetchone()
            raise BatchError(
                f"Lines {found[0]:,} and {line.number:,} have the same custom_id, {line.custom_id[:80]!r}.",
                remedy="Give them different ones, and run their parts again with --overwrite.",
            ) from e
