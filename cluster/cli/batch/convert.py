"""Converts JSON lines, CSV and Parquet into the lines of a batch file, as a stream. Does not check whether a request is valid.

The row's field decides what it becomes, unless the endpoint is given: `prompt` a completion, `messages` a conversation, `input` an
embedding. A row that already is a request of a batch file stays as it is. From tables, only columns named like request fields are used; a
template may build the text and the custom_id from columns. Rows without a `custom_id` or `id` are named by their number. Each line has its
row's number; a skipped row becomes an empty line.
"""

import csv
import io
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, BinaryIO, Literal, get_args

import msgspec

from cluster.batch.lines import MAX_LINE_BYTES
from workers.errors import ConfigError, RequestError

Format = Literal["jsonl", "csv", "parquet"]
FORMATS: tuple[Format, ...] = get_args(Format)
_ENDINGS: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".parquet": "parquet",
    ".pq": "parquet",
}
_BY_FIELD = {"messages": "/v1/chat/completions", "prompt": "/v1/completions", "input": "/v1/embeddings"}
_RESPONSES = "/v1/responses"
_FIELD_OF = {path: name for name, path in _BY_FIELD.items()} | {_RESPONSES: "input", "/v1/messages": "messages"}
_ID_COLUMNS = ("custom_id", "id")
_PARQUET_ROWS = 1024
# Columns of a table that are request parameters, and how their text is parsed.
_COLUMNS: dict[str, type] = {
    "model": str,
    "max_tokens": int,
    "max_completion_tokens": int,
    "min_tokens": int,
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "n": int,
    "seed": int,
    "stop": str,
    "presence_penalty": float,
    "frequency_penalty": float,
    "repetition_penalty": float,
    "priority": int,
    "suffix": str,
    "user": str,
}
_FIELDS = {*_COLUMNS, *_BY_FIELD}
_COLUMN = re.compile(r"\{(\w+)\}")  # in a template


@dataclass(frozen=True, kw_only=True)
class LineTemplate:
    """What rows do not say themselves. endpoint: None means that the row's fields decide. defaults: body fields for rows without them.

    text: a template with columns in braces ("Translate: {text}") for the prompt, the user's message or the input, depending on the
    endpoint. custom_id: a template of the same kind.
    """

    model: str
    endpoint: str | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    text: str | None = None
    custom_id: str | None = None


def guess_format(name: str) -> Format:
    """The format that the ending of a file name or address stands for. Raises ConfigError for an unknown ending."""
    found = _ENDINGS.get(PurePosixPath(name.lower()).suffix)
    if found is None:
        raise ConfigError(
            f"The ending of {name} does not say its format.",
            remedy="Add --format jsonl, csv or parquet.",
            param="--format",
        )
    return found


def convert(
    source: BinaryIO,
    *,
    format: Format,  # noqa: A002 - the option's name
    template: LineTemplate,
    is_wanted: Callable[[int], bool] = lambda number: True,
) -> Iterator[bytes]:
    """Yields the lines of a batch file, each with its newline and the empty lines before it.

    Raises RequestError, which names the row, for one that cannot be converted. is_wanted: whether the row of this number (from 1) is
    wanted; the content of other rows is not read.
    """
    endpoint, last = template.endpoint, 0
    for number, row in _rows(source, format, is_wanted):
        skipped, last = b"\n" * (number - last - 1), number
        if isinstance(row, bytes):  # a batch's line already
            yield skipped + row + b"\n"
            continue
        found, line = _request(row, number, template, is_table=format != "jsonl")
        endpoint = endpoint or found
        if found != endpoint:
            raise RequestError(
                f"Row {number} is for {found}, but the rows before it are for {endpoint}.",
                remedy="A batch has one endpoint: split the file.",
            )
        yield skipped + line


def _rows(
    source: BinaryIO, kind: Format, is_wanted: Callable[[int], bool]
) -> Iterator[tuple[int, dict[str, Any] | bytes]]:
    readers = {"jsonl": _json_rows, "csv": _csv_rows, "parquet": _parquet_rows}
    yield from readers[kind](source, is_wanted)


def _request(row: dict[str, Any], number: int, template: LineTemplate, *, is_table: bool) -> tuple[str, bytes]:
    endpoint = template.endpoint
    if template.custom_id is not None:
        ids = [_fill(template.custom_id, row, number)]
    else:
        ids = [str(row[name]) for name in _ID_COLUMNS if row.get(name) not in (None, "")]
    only_fields = is_table or template.text is not None
    named = {*_ID_COLUMNS, *(_columns_of(template.custom_id) - _FIELDS)}
    kept = {k: v for k, v in row.items() if (k in _FIELDS if only_fields else k not in named)}
    body = {"model": template.model, **template.defaults, **kept}
    if template.text is not None:
        endpoint = endpoint or "/v1/completions"
        text = _fill(template.text, row, number)
        body = {k: v for k, v in body.items() if k not in _BY_FIELD}
        name = _FIELD_OF[endpoint]
        body[name] = [{"role": "user", "content": text}] if name == "messages" else text
    names = [name for name in _BY_FIELD if body.get(name) not in (None, "")]
    if len(names) != 1:
        held = ", ".join(sorted(row)[:20]) or "nothing"
        raise RequestError(
            f"Row {number} has none of 'prompt', 'messages' and 'input'; it has {held}."
            if not names
            else f"Row {number} has {' and '.join(repr(n) for n in names)}, but only one of them is allowed."
        )
    if endpoint is not None and (wanted := _FIELD_OF[endpoint]) != names[0]:
        if names[0] != "prompt":
            raise RequestError(f"Row {number} has {names[0]!r}, which {endpoint} does not accept.")
        # A plain prompt has another name there.
        text = body.pop("prompt")
        body[wanted] = text if wanted == "input" else [{"role": "user", "content": text}]
    endpoint = endpoint or _BY_FIELD[names[0]]
    if endpoint == _RESPONSES and "max_tokens" in body:
        body.setdefault("max_output_tokens", body.pop("max_tokens"))
    line = {"custom_id": ids[0] if ids else f"line-{number}", "method": "POST", "url": endpoint, "body": body}
    return endpoint, msgspec.json.encode(line) + b"\n"


def _fill(text: str, row: dict[str, Any], number: int) -> str:
    def value(found: re.Match[str]) -> str:
        if row.get(found[1]) is None:
            held = ", ".join(sorted(row)[:20])
            raise RequestError(f"Row {number} has no {found[1]!r}, which the template needs; it has {held}.")
        return str(row[found[1]])

    return _COLUMN.sub(value, text)


def _columns_of(text: str | None) -> set[str]:
    return set(_COLUMN.findall(text or ""))


def _json_rows(source: BinaryIO, is_wanted: Callable[[int], bool]) -> Iterator[tuple[int, dict[str, Any] | bytes]]:
    decoder = msgspec.json.Decoder(dict[str, Any])
    number = 0
    while raw := source.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(raw) > MAX_LINE_BYTES:
            raise RequestError(f"Line {number} is longer than the limit of {MAX_LINE_BYTES:,} bytes.")
        if not is_wanted(number):
            continue
        data = raw.removeprefix(b"\xef\xbb\xbf").strip()
        if not data:
            continue
        try:
            row = decoder.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError) as e:
            raise RequestError(f"Line {number} is not a JSON object: {e}.") from e
        yield number, data if "body" in row and "custom_id" in row else row


def _csv_rows(source: BinaryIO, is_wanted: Callable[[int], bool]) -> Iterator[tuple[int, dict[str, Any]]]:
    text = io.TextIOWrapper(source, encoding="utf-8-sig", newline="")
    csv.field_size_limit(MAX_LINE_BYTES)
    try:
        reader = csv.DictReader(text, strict=True)
        for number, row in enumerate(reader, start=1):
            if None in row:  # DictReader's key for fields without a header
                raise RequestError(f"Row {number} has more fields than the header has names.")
            if is_wanted(number):
                yield number, _typed(row, number)
    except (csv.Error, UnicodeDecodeError) as e:
        raise RequestError(f"The CSV cannot be read near line {reader.line_num + 1}: {e}.") from e
    finally:
        text.detach()  # the caller closes the source


def _typed(row: dict[str, Any], number: int) -> dict[str, Any]:
    typed: dict[str, Any] = {}
    for name, value in row.items():
        if value in (None, ""):
            continue
        try:
            typed[name] = _COLUMNS.get(name, str)(value) if name != "messages" else msgspec.json.decode(value)
        except (ValueError, msgspec.DecodeError) as e:
            raise RequestError(f"Row {number}: {name!r} is {value[:40]!r}, which cannot be read.") from e
    return typed


def _parquet_rows(source: BinaryIO, is_wanted: Callable[[int], bool]) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        from pyarrow import ArrowInvalid
        from pyarrow.parquet import ParquetFile
    except ImportError as e:
        raise ConfigError(
            "Reading Parquet needs pyarrow, which is not installed.",
            remedy="Install it with: pip install 'tramontane[parquet]'.",
        ) from e
    try:
        table = ParquetFile(source)
        number = 0
        for rows in table.iter_batches(batch_size=_PARQUET_ROWS):
            for row in rows.to_pylist():
                number += 1
                if is_wanted(number):
                    yield number, {name: value for name, value in row.items() if value is not None}
    except ArrowInvalid as e:
        raise RequestError(f"The Parquet file cannot be read: {e}.") from e
