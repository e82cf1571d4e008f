"""How far the parts of an output are, as far as their records tell: a part that still runs has none. Knows records, and no running job."""

import msgspec

from cluster.cli.batch.parts.records import Part, find_parts, read_records


class PartsStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Of `num_parts`, those that are whole and those that are not; the lines are those of the former."""

    num_parts: int
    num_whole: int
    lacking: list[str]
    num_lines: int
    num_completed: int
    num_failed: int


def status_of_parts(output: str) -> list[PartsStatus]:
    """For each number of parts into which the output was shared out; empty where there are none. Raises as `read_record`."""
    found = find_parts(output)
    statuses = []
    for count in sorted({part.count for part in found}):
        records = read_records(output, count, found)
        outcomes = [record.outcome for record in records.values()]
        statuses.append(
            PartsStatus(
                num_parts=count,
                num_whole=len(outcomes),
                lacking=[str(part) for index in range(count) if (part := Part(index, count)) not in records],
                num_lines=sum(outcome.num_lines for outcome in outcomes),
                num_completed=sum(outcome.num_completed for outcome in outcomes),
                num_failed=sum(outcome.num_failed for outcome in outcomes),
            )
        )
    return statuses


def sentence(status: PartsStatus, output: str) -> str:
    lines = f"{status.num_completed:,} of their {status.num_lines:,} lines are answered"
    if not status.lacking:
        return f"All {status.num_parts:,} parts are whole, {lines}; `tramontane batch merge {output}` joins them."
    shown = ", ".join(status.lacking[:10]) + (", ..." if len(status.lacking) > 10 else "")
    return f"{status.num_whole:,} of {status.num_parts:,} parts are whole, {lines}; not yet: {shown}."
