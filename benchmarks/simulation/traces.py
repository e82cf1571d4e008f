"""Request traces of real services as arrays of requests: the Azure and Mooncake files, scaled to any number of replicas.

Knows files and times; does not know replicas. Copies of a trace share no prefix and start at different places in it, so that 1,000
replicas see many independent populations of users instead of one that is 100 times as busy.
"""

import csv
import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

MOONCAKE_BLOCK = 512  # tokens of a prefix block in Mooncake's trace


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """`arrival_s` counts from the trace's start. `hashes`: of every full block of the prompt."""

    arrival_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    hashes: tuple[bytes, ...]


def load(path: Path, max_prompt_tokens: int) -> list[TraceRequest]:
    """One trace. Prompts longer than the model's context are cut to it."""
    if path.suffix == ".jsonl":
        return [_mooncake(json.loads(line), max_prompt_tokens) for line in path.read_text().splitlines()]
    with path.open(newline="") as file:
        rows = [(_seconds(r["TIMESTAMP"]), r) for r in csv.DictReader(file)]
    requests = []
    for number, (at, row) in enumerate(rows):
        num_tokens = max(1, min(int(row["ContextTokens"]), max_prompt_tokens))
        own = tuple(_name(number, i) for i in range(num_tokens // MOONCAKE_BLOCK))
        requests.append(TraceRequest(at - rows[0][0], num_tokens, max(1, int(row["GeneratedTokens"])), own))
    return requests


def replicate(trace: list[TraceRequest], num_copies: int, duration_s: float) -> list[TraceRequest]:
    """`num_copies` of the trace within `duration_s`, each rotated by its share of the time, in order of arrival."""
    span_s = trace[-1].arrival_s * (1 + 1 / len(trace))
    speed = span_s / duration_s
    requests = []
    for copy in range(num_copies):
        mark = copy.to_bytes(4, "big")
        shift_s = span_s * copy / num_copies
        for r in trace:
            at = (r.arrival_s + shift_s) % span_s / speed
            hashes = tuple(mark + h for h in r.hashes)
            requests.append(TraceRequest(at, r.num_prompt_tokens, r.num_output_tokens, hashes))
    requests.sort(key=lambda r: r.arrival_s)
    return requests


def _mooncake(row: dict, max_prompt_tokens: int) -> TraceRequest:
    num_tokens = min(row["input_length"], max_prompt_tokens)
    hashes = tuple(h.to_bytes(8, "big") for h in row["hash_ids"][: num_tokens // MOONCAKE_BLOCK])
    return TraceRequest(row["timestamp"] / 1e3, num_tokens, max(1, row["output_length"]), hashes)


def _name(request: int, block: int) -> bytes:
    return request.to_bytes(4, "big") + block.to_bytes(4, "big")


def _seconds(timestamp: str) -> float:
    return datetime.fromisoformat(timestamp[:26]).timestamp()
