"""Traces of real services: when requests came, how long prompts and answers were, which prompts begin alike.

    TIMESTAMP,ContextTokens,GeneratedTokens                                       CSV, as Azure publishes its LLM traces
    {"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47]}     JSONL, as Mooncake does: milliseconds, and
                                                                                  one id for each block of 512 tokens of the prompt

Knows these two formats. Prompts themselves are made elsewhere: neither trace has any text.
"""

import csv
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import msgspec

from workers.errors import ConfigError

BLOCK_TOKENS = 512  # of a prompt, for each of Mooncake's hash_ids
_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


@dataclass(frozen=True, slots=True)
class TraceRow:
    """at_s: seconds after the first row. hash_ids: equal ids at the beginning mean equal blocks; empty where the trace has none."""

    at_s: float
    num_prompt: int
    num_output: int
    hash_ids: tuple[int, ...] = ()


class _MooncakeLine(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int] = []


def read_trace(path: Path, *, limit: int | None = None) -> list[TraceRow]:
    """The first `limit` rows by time. Raises ConfigError for a file that is not one of the two formats."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            first = file.readline()
            file.seek(0)
            rows = _azure(csv.DictReader(file)) if first.startswith("TIMESTAMP") else _mooncake(file)
            found = sorted(rows, key=lambda row: row.at_s)
    except OSError as e:
        raise ConfigError(
            f"--trace {path} cannot be read: {e.strerror or e}.", remedy="Check the path.", param="--trace"
        ) from e
    except (ValueError, KeyError, TypeError, msgspec.DecodeError) as e:
        raise ConfigError(
            f"--trace {path} is not a trace: {e}.",
            remedy=f"Give a CSV file with the columns {', '.join(_COLUMNS)}, or JSONL with timestamp, input_length and output_length.",
            param="--trace",
        ) from e
    if not found:
        raise ConfigError(f"--trace {path} has no requests.", remedy="Give another file.", param="--trace")
    began = found[0].at_s
    kept = itertools.islice(found, limit)
    return [TraceRow(r.at_s - began, r.num_prompt, r.num_output, r.hash_ids) for r in kept]


def _azure(rows: "csv.DictReader[str]") -> Iterator[TraceRow]:
    for row in rows:
        # Seven digits of a second; Python reads six.
        stamp = datetime.fromisoformat(row["TIMESTAMP"][:26])
        yield _row(stamp.timestamp(), int(row["ContextTokens"]), int(row["GeneratedTokens"]))


def _mooncake(lines: Iterator[str]) -> Iterator[TraceRow]:
    decoder = msgspec.json.Decoder(_MooncakeLine)
    for number, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        try:
            line = decoder.decode(text)
        except msgspec.DecodeError as e:
            raise ValueError(f"line {number}: {e}") from e
        if len(line.hash_ids) * BLOCK_TOKENS >= line.input_length + BLOCK_TOKENS:
            raise ValueError(f"line {number} has more hash_ids than blocks of {BLOCK_TOKENS} tokens")
        yield _row(line.timestamp / 1000, line.input_length, line.output_length, tuple(line.hash_ids))


def _row(at_s: float, num_prompt: int, num_output: int, hash_ids: tuple[int, ...] = ()) -> TraceRow:
    """A request of no tokens counts as one of one token."""
    return TraceRow(at_s, max(1, num_prompt), max(1, num_output), hash_ids)
