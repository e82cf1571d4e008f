"""Workloads: which requests are sent and when. Random but seeded: the same seed plans the same requests.

    closed loop     N streams, each sends its next request when its last one has ended
    Poisson         requests come at random, R a second on average, however long the answers take
    trace           requests come when, and are as long as, a file says

Knows lengths, times and which parts prompts have in common; the text of a prompt is made in `prompts`.
"""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.bench.lengths import Lengths
from cluster.bench.trace import BLOCK_TOKENS, TraceRow

DEFAULT_WARMUP = 8  # requests, at most; not more than there are streams
# First numbers of the seeds of parts, so that no two kinds have the same tokens.
_PREFIX, _OWN, _BLOCK = range(3)


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a prompt. Equal seeds mean equal tokens."""

    seed: tuple[int, ...]
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Planned:
    """at_s: seconds after the load began; None in a closed loop."""

    parts: tuple[Part, ...]
    num_output: int
    at_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class Shape:
    """shared_prefix: tokens before each prompt that it has in common with others; one of `num_prefixes` different ones."""

    prompt: Lengths
    output: Lengths
    shared_prefix: int = 0
    num_prefixes: int = 1


@dataclass(frozen=True, kw_only=True)
class Level:
    """One load of a benchmark. Exactly one of num_streams, rate (requests a second) and trace is set."""

    label: str
    num_requests: int
    num_streams: int | None = None
    rate: float | None = None
    trace: Sequence[TraceRow] | None = None
    trace_speed: float = 1.0


def closed_level(num_streams: int, *, num_requests: int) -> Level:
    label = f"{num_streams} stream{'s' * (num_streams != 1)}"
    return Level(label=label, num_requests=num_requests, num_streams=num_streams)


def poisson_level(rate: float, *, num_requests: int) -> Level:
    return Level(label=f"{rate:g} requests/s", num_requests=num_requests, rate=rate)


def trace_level(rows: Sequence[TraceRow], *, name: str, speed: float) -> Level:
    label = name if speed == 1 else f"{name}, {speed:g} times as fast"
    return Level(label=label, num_requests=len(rows), trace=rows, trace_speed=speed)


def plan_requests(level: Level, shape: Shape, *, seed: int, salt: int) -> list[Planned]:
    """The requests of one round, in the order in which they are sent.

    seed: decides lengths and times. salt: with `seed` decides the tokens, so that two servers get the same load and none gets a prompt
    that another run has left in its prefix cache.
    """
    if level.trace is not None:
        return [
            Planned(_trace_parts(row, i, (seed, salt)), row.num_output, row.at_s / level.trace_speed)
            for i, row in enumerate(level.trace)
        ]
    num = level.num_requests
    rng = random.Random(f"lengths {seed}")
    prompts, outputs = shape.prompt.sample(rng, num), shape.output.sample(rng, num)
    prefixes = [rng.randrange(shape.num_prefixes) for _ in range(num)]
    at = _arrivals(level.rate, num, seed) if level.rate is not None else [None] * num
    planned = []
    for i in range(num):
        own = Part((_OWN, seed, salt, i), prompts[i])
        if shape.shared_prefix:
            parts: tuple[Part, ...] = (Part((_PREFIX, seed, salt, prefixes[i]), shape.shared_prefix), own)
        else:
            parts = (own,)
        planned.append(Planned(parts, outputs[i], at[i]))
    return planned


def _arrivals(rate: float, num: int, seed: int) -> list[float]:
    """A Poisson process that begins with its first request, at 0."""
    rng = random.Random(f"arrivals {seed}")
    return list(itertools.accumulate((rng.expovariate(rate) for _ in range(num - 1)), initial=0.0))


def _trace_parts(row: TraceRow, number: int, seeds: tuple[int, int]) -> tuple[Part, ...]:
    """Worked example: 700 tokens with hash_ids (4, 9) are the 512 tokens of block 4 and the first 188 of block 9."""
    parts, left = [], row.num_prompt
    for hash_id in row.hash_ids:
        if left <= 0:
            break
        parts.append(Part((_BLOCK, *seeds, hash_id), min(BLOCK_TOKENS, left)))
        left -= BLOCK_TOKENS
    if left > 0:
        parts.append(Part((_OWN, *seeds, number), left))
    return tuple(parts)
