"""One file's lines shared out over N jobs that know nothing of each other, such as those of a SkyPilot pool: whose is which, and where.

Part I of N answers lines I+1, I+1+N, I+1+2N, ...: each has its share of whatever the file begins and ends with. The last file that a part
writes, its record, says that the others are whole. Knows names and records; runs and merges nothing.
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

    def holds(self, number: int) -> bool:
        """Whether the line of this number, from 1, is its own. Example: part 1 of 3 holds lines 2, 5, 8."""
        return (number - 1) % self.count == self.index

    def location(self, whole: str) -> str:
        """Where this part of a file is: "out.jsonl" is "out.part-00001-of-00003.jsonl"."""
        return locations.with_suffix(whole, f".part-{self.index:05}-of-{self.count:05}")

    def record_location(self, whole: str) -> str:
        """Where the record of this part of an output is, once it is whole."""
        return self.location(whole) + RECORD_SUFFIX


class PartRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A part that is whole. `source_bytes`: of the input as the part saw it, None where nobody can tell (stdin).

    `batch_id`: by it the ids of the answers tell their lines' numbers.
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
    """ "3/10". Raises ValueError with what to write instead."""
    found = _FORM.fullmatch(text)
    if found is None:
        raise ValueError(f"{text!r} is no part; write I/N with I from 0 to N-1, such as 0/10")
    part = Part(int(found[1]), int(found[2]))
    if not part.index < part.count <= MAX_PARTS:
        raise ValueError(
            f"{text} is no part: I counts from 0 to N-1, so of {part.count} the last is {max(0, part.count - 1)}"
            if part.count <= MAX_PARTS
            else f"{text} is no part: there can be {MAX_PARTS:,} at most"
        )
    return part


def part_of(job: Job) -> Part | None:
    text = job.request.get("part")
    return None if text is None else parse_part(text)


def record_location(job: Job) -> str:
    """Where the record of this job, which is a part, is."""
    return job.output + RECORD_SUFFIX


def record_of(job: Job) -> PartRecord:
    """Of a part that is over."""
    assert job.outcome is not None, "the part is not over"
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
    """None where there is none. Raises BatchError for one that cannot be read, and LocationError."""
    if not locations.exists(location):
        return None
    with locations.reading(location) as source:
        data = source.read()
    try:
        return msgspec.json.decode(data, type=PartRecord)
    except msgspec.DecodeError as e:
        raise BatchError(
            f"{location} is no record of a part ({e}); delete it, and run the part again with --overwrite."
        ) from e


def finished(asked: Job) -> Job | None:
    """The part that is asked for, if it is whole already, wherever it was made. Raises ConfigError if it answers something else."""
    record = read_record(record_location(asked))
    if record is None:
        return None
    if record.request != asked.request:
        raise ConfigError(
            f"{asked.output} is whole, and answers something else than what is asked for; name another output, or add --overwrite."
        )
    if None not in (record.source_bytes, asked.source_bytes) and record.source_bytes != asked.source_bytes:
        raise ConfigError(
            f"{asked.source} has changed since {asked.output} was made of it; add --overwrite to make this part, and all others, anew."
        )
    return msgspec.structs.replace(asked, created_at=record.created_at, outcome=record.outcome)


def read_records(whole: str, count: int, found: Mapping[Part, bool]) -> dict[Part, PartRecord]:
    """Of the `count` parts of this output those that are whole, in order. found: as `find_parts` says. Raises as `read_record`."""
    records = {}
    for part in (Part(index, count) for index in range(count)):
        record = read_record(part.record_location(whole)) if found.get(part) else None
        if record is not None:
            records[part] = record
    return records


def find_parts(whole: str) -> dict[Part, bool]:
    """The parts of this output that are there, and of each whether it is whole. Raises ConfigError and LocationError."""
    name = whole.rpartition("/")[2]
    found: dict[Part, bool] = {}
    for entry in locations.names_beside(whole):
        is_record = entry.endswith(RECORD_SUFFIX)
        for index, count in re.findall(r"\.part-([0-9]{5})-of-([0-9]{5})", entry):
            part = Part(int(index), int(count))
            if part.count <= MAX_PARTS and part.location(name) == entry.removesuffix(RECORD_SUFFIX):
                found[part] = found.get(part, False) or is_record
    return found
