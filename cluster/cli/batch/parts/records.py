"""Parts: the lines of one file split over N independent jobs, such as those of a SkyPilot pool. Which line is in which part, and names.

Part I of N answers lines I+1, I+1+N, I+1+2N, ..., so that each part gets an even mix of the file's lines. The last file that a part
writes, its record, says that the others are complete. Knows names and records. Runs and merges nothing.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from cluster.batch.errors import BatchError
from cluster.cli.batch import locations
from cluster.cli.batch.job import Job, Outcome
from workers.errors import ConfigError

MAX_PARTS = 10_000
RECORD_SUFFIX = ".done"
_FORM = re.compile(r"([0-9]{1,6})/([0-9]{1,6})")


@dataclass(frozen=True, order=True)
class Part:
    """Part `index`, from 0, of `count`."""

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def contains(self, number: int) -> bool:
        """Whether the line of this number (from 1) is in this part. Example: part 1/3 contains lines 2, 5, 8."""
        return (number - 1) % self.count == self.index

    def location(self, target: str) -> str:
        """The location of this part of a file: "out.jsonl" becomes "out.part-00001-of-00003.jsonl"."""
        return locations.with_suffix(target, f".part-{self.index:05}-of-{self.count:05}")

    def record_location(self, target: str) -> str:
        """The location of the record of this part of an output."""
        return self.location(target) + RECORD_SUFFIX


class PartRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The record of a complete part. `source_bytes`: the size of the input when the part was computed, None for stdin.

    `batch_id`: with it, the ids of the answers show the numbers of their lines.
    """

    part: str
    source: str
    source_bytes: int | None
    request: dict[str, Any]
    batch_id: str | None
    created_at: float
    outcome: Outcome
    schema: int = 1


def parse_part(text: str) -> Part:
    """Parses "3/10". Raises ValueError, which says what to write instead."""
    found = _FORM.fullmatch(text)
    if found is None:
        raise ValueError(f"{text!r} is not a part; write I/N with I from 0 to N-1, such as 0/10")
    part = Part(int(found[1]), int(found[2]))
    if not part.index < part.count <= MAX_PARTS:
        raise ValueError(
            f"{text} is not a part: I counts from 0 to N-1, so the last of {part.count} is {max(0, part.count - 1)}"
            if part.count <= MAX_PARTS
            else f"{text} is not a part: there can be {MAX_PARTS:,} parts at most"
        )
    return part


def part_of(job: Job) -> Part | None:
    """The part that this job computes; None for a job that computes everything."""
    text = job.request.get("part")
    return None if text is None else parse_part(text)


def record_location(job: Job) -> str:
    """The location of the record of this job, which is a part."""
    return job.output + RECORD_SUFFIX


def record_of(job: Job) -> PartRecord:
    """The record of a part that has ended."""
    assert job.outcome is not None, "the part has not ended"
    return PartRecord(
        part=job.request["part"],
        source=job.source,
        source_bytes=job.source_bytes,
        request=job.request,
        batch_id=job.batch_id,
        created_at=job.created_at,
        outcome=job.outcome,
    )


def read_record(location: str) -> PartRecord | None:
    """The record, or None. Raises BatchError for one that cannot be read, and LocationError."""
    if not locations.exists(location):
        return None
    with locations.reading(location) as source:
        data = source.read()
    try:
        return msgspec.json.decode(data, type=PartRecord)
    except msgspec.DecodeError as e:
        raise BatchError(
            f"{location} is not the record of a part: {e}.",
            remedy="Delete it, and run the part again with --overwrite.",
        ) from e


def finished(requested: Job) -> Job | None:
    """The requested part, if it is complete already, on whichever machine. Raises ConfigError if its options differ."""
    record = read_record(record_location(requested))
    if record is None:
        return None
    if record.request != requested.request:
        raise ConfigError(
            f"{requested.output} is complete, but was computed with other options.",
            remedy="Choose another output, or add --overwrite.",
            param="--overwrite",
        )
    if None not in (record.source_bytes, requested.source_bytes) and record.source_bytes != requested.source_bytes:
        raise ConfigError(
            f"{requested.source} has changed since {requested.output} was computed from it.",
            remedy="Add --overwrite to compute this part again, and all others too.",
            param="--overwrite",
        )
    return msgspec.structs.replace(requested, created_at=record.created_at, outcome=record.outcome)


def read_records(target: str, count: int, found: Mapping[Part, bool]) -> dict[Part, PartRecord]:
    """The complete parts among the `count` parts of this output, in order. found: from `find_parts`. Raises the same as `read_record`."""
    records = {}
    for part in (Part(index, count) for index in range(count)):
        record = read_record(part.record_location(target)) if found.get(part) else None
        if record is not None:
            records[part] = record
    return records


def find_parts(target: str) -> dict[Part, bool]:
    """The parts of this output that exist, each with whether it is complete. Raises ConfigError and LocationError."""
    name = target.rpartition("/")[2]
    found: dict[Part, bool] = {}
    for entry in locations.names_in_folder_of(target):
        is_record = entry.endswith(RECORD_SUFFIX)
        for index, count in re.findall(r"\.part-([0-9]{5})-of-([0-9]{5})", entry):
            part = Part(int(index), int(count))
            if part.count <= MAX_PARTS and part.location(name) == entry.removesuffix(RECORD_SUFFIX):
                found[part] = found.get(part, False) or is_record
    return found
