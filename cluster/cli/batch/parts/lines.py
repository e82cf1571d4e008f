"""A part's lines with their numbers, read from its two files side by side. Knows the form of output lines, and no other part.

A line's id is made of its batch and its number: so it tells which of the two files has the line of a number, without the input. An input's
empty lines have no answer, and are passed over.
"""

import contextlib
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from cluster.batch.errors import BatchError
from cluster.batch.records import line_id
from cluster.cli.batch.parts.records import Part, PartRecord

MAX_EMPTY_LINES = 1_000_000  # one after the other


class _Answer(msgspec.Struct, frozen=True):
    """What is read of a line."""

    id: str
    custom_id: str


_answer = msgspec.json.Decoder(_Answer)


@dataclass(frozen=True)
class PartLine:
    """Of an output or error file, with its end."""

    number: int
    is_error: bool
    custom_id: str
    data: bytes


def lines_of(part: Part, record: PartRecord, *, output: Path, errors: Path | None) -> Generator[PartLine, None, None]:
    """A part's lines by their numbers. Raises BatchError where the files are not what the record says."""
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
                    part, f"{next(iter(heads.values()))[0].custom_id!r} is no line of it, or not in its order"
                )
            number += part.count
    wanted_counts = {False: record.outcome.num_completed, True: record.outcome.num_failed}
    if counts != wanted_counts:
        raise _changed(part, f"{sum(counts.values()):,} lines are there, {sum(wanted_counts.values()):,} were written")


def _read(stack: contextlib.ExitStack, part: Part, path: Path) -> Iterator[tuple[_Answer, bytes]]:
    try:
        file = stack.enter_context(path.open("rb"))
    except FileNotFoundError as e:
        raise _changed(part, f"{path} is not there") from e
    except OSError as e:
        raise BatchError(f"{path} cannot be read: {e.strerror}.") from e
    for data in file:
        try:
            yield _answer.decode(data), data.rstrip(b"\n") + b"\n"
        except (msgspec.DecodeError, UnicodeDecodeError) as e:
            raise _changed(part, f"{path} holds a line that is no answer ({e})") from e


def _changed(part: Part, what: str) -> BatchError:
    return BatchError(
        f"Part {part} is not what its batch wrote: {what}. Run it again with --overwrite; if its errors went elsewhere, say --errors FILE "
        "as its command did."
    )
