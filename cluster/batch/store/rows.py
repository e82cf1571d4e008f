"""Converts between the rows of the store's tables and the values of records.py. Runs no SQL."""

from typing import TypeVar

import msgspec

from cluster.batch.records import Line, LineResult
from cluster.batch.store.database import Row
from cluster.batch.store.order import length_class

_T = TypeVar("_T")


def decode(data: bytes, kind: type[_T]) -> _T:
    """A record from its column."""
    return msgspec.json.decode(bytes(data), type=kind)


def to_line(row: Row, position: int = 0) -> Line:
    """Of a row that starts with LINE_COLUMNS."""
    number, custom_id, offset, num_bytes, group_key, num_tokens, crashes, lone_crashes = row[:8]
    return Line(
        number=number,
        custom_id=custom_id,
        offset=offset,
        num_bytes=num_bytes,
        group_key=group_key,
        num_tokens=num_tokens,
        crashes=crashes,
        lone_crashes=lone_crashes,
        position=position,
    )


def to_result(row: Row) -> LineResult | None:
    """Of a row of ANSWERED; None for a line without a result."""
    status_code, request_id, error_code, error_message, num_prompt, num_cached, num_output, body = row[8:]
    if request_id is None:  # no result was joined
        return None
    return LineResult(
        number=row[0],
        status_code=status_code,
        request_id=request_id,
        error_code=error_code,
        error_message=error_message,
        num_prompt_tokens=num_prompt,
        num_cached_tokens=num_cached,
        num_output_tokens=num_output,
        body=bytes(body),
    )


def line_row(seq: int, line: Line) -> Row:
    """The values of INSERT_LINE. seq: the key of the batch's row."""
    location = (seq, line.number, line.custom_id, line.offset, line.num_bytes)
    planning = (line.group_key, line.num_tokens, length_class(line.num_tokens))
    return (*location, *planning, line.crashes, line.lone_crashes)


def result_row(seq: int, result: LineResult) -> Row:
    """The values of INSERT_RESULT. seq: the key of the batch's row."""
    error = (result.error_code, result.error_message)
    counts = (result.num_prompt_tokens, result.num_cached_tokens, result.num_output_tokens)
    return (seq, result.number, result.status_code, result.request_id, *error, *counts, result.body)
