"""The lines of a part with their numbers, read from its output and its error file in parallel. Knows no other part.

The id of a line is derived from its batch and its number, so it shows which of the two files has the line of a given number, without the
input. Empty lines of the input have no answer and are skipped.
"""

import contextlib
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from cluster.batch.errors import BatchError
from cluster.batch.records import line_id
from cluster.cli.batch.parts.records import Part, PartRecord

MAX_EMPTY_LINES = 1_000_000  # in a row


class _Answer(msgspec.Struct, frozen=True):
    """The fields of a line that are read."""

    id: str
    custom_id: str


_answer = msgspec.json.Decoder(_Answer)


@dataclass(frozen=True)
class PartLine:
    """A line of an output or error file. `data` has the newline."""

    number: int
    is_error: bool
    custom_id: str
    data: bytes


def lines_of(part: Part, record: PartRecord, *, output: Path, errors: Path | None) -> Generator[PartLine, None, None]:
    """Yields the lines of a part in the order of their numbers. Raises BatchError if the files do not match the record."""
    with contextlib.ExitStack() as stack:
        readers = {False: _read(stack, part, output)}
        if errors is not None:
            readers[True] = _read(stack, part, errors)
        counts = dict.fromkeys((False, True), 0)
        heads = {kind: head for kind, reader in readers.items() if (head := next(reader, None)) is not None}
        number, num_empty = part.index + 1, 0
        while heads:
            wanted = line_id(record.batch_id or "", number)
            kind = next((kind for kind, (answer, _) in heads.items() if answer.id == wanted), None)
            if kind is not None:
                answer, data = heads.pop(kind)
                yield PartLine(number, kind, answer.custom_id, data)
                counts[kind] += 1
                if (head := next(readers[kind], None)) is not None:
                    heads[kind] = head
            num_empty = 0 if kind is not None else num_empty + 1
            if num_empty > MAX_EMPTY_LINES:
                raise _changed(
                    part, f"{next(iter(heads.values()))[0].custom_id!r} is not a line of it, or out of order"
                )
            number += part.count
    wanted_counts = {False: record.outcome.num_completed, True: record.outcome.num_failed}
    if counts != wanted_counts:
        raise _changed(part, f"it has {sum(counts.values()):,} lines, but {sum(wanted_counts.values()):,} were written")


def _read(stack: contextlib.ExitStack, part: Part, path: Path) -> Iterator[tuple[_Answer, bytes]]:
    try:
        file = stack.enter_context(path.open("rb"))
    except FileNotFoundError as e:
        raise _changed(part, f"{path} does not exist") from e
    except OSError as e:
        raise BatchError(f"{path} cannot be read: {e.strerror}.") from e
    for data in file:
        try:
            yield _answer.decode(data), data.rstrip(b"\n") + b"\n"
        except (msgspec.DecodeError, UnicodeDecodeError) as e:
            raise _changed(part, f"{path} has a line that is not an answer ({e})") from e


def _changed(part: Part, what: str) -> BatchError:
    return BatchError(
        f"Part {part} has changed since its batch wrote it: {what}.",
        remedy="Run it again with --overwrite, or, if it was run with --errors FILE, give the same --errors here.",
    )
