"""The progress of an output's parts, from their records; a part that is still running has none. Does not look at running jobs."""

import msgspec

from cluster.cli.batch.parts.records import Part, find_parts, read_records


class PartsStatus(msgspec.Struct, frozen=True, kw_only=True):
    """How many of `num_parts` are complete (`num_whole`), and which are not (`lacking`). Counts the lines of the complete ones."""

    num_parts: int
    num_whole: int
    lacking: list[str]
    num_lines: int
    num_completed: int
    num_failed: int


def status_of_parts(output: str) -> list[PartsStatus]:
    """One status for each number of parts that the output was split into. Raises the same as `read_record`."""
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


def describe_parts(status: PartsStatus, output: str) -> str:
    lines = f"{status.num_completed:,} of their {status.num_lines:,} lines are answered"
    if not status.lacking:
        return (
            f"All {status.num_parts:,} parts are complete, {lines}. Join them with `tramontane batch merge {output}`."
        )
    shown = ", ".join(status.lacking[:10]) + (", ..." if len(status.lacking) > 10 else "")
    return f"{status.num_whole:,} of {status.num_parts:,} parts are complete, {lines}. Missing: {shown}."
