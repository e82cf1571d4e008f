"""Times generations step by step, the same way for every engine. Runs in each engine's own interpreter, so it needs nothing installed.

An engine is a function from prompts to an iterator that yields once after each step: the number of the sequence of each new token.
"""

import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

PREFILL_TOKENS = 512
Generate = Callable[[Sequence[list[int]], int], Iterator[list[int]]]


def read_job() -> dict[str, Any]:
    """The first argument of the command, which is one JSON object."""
    job: dict[str, Any] = json.loads(sys.argv[1])
    return job


def write_result(result: dict[str, Any]) -> None:
    """The last line of the output. Engines write their logs to the same stream before it."""
    sys.stdout.flush()
    print("\n" + json.dumps(result), flush=True)


def prompts(num_prompts: int, num_tokens: int, *, vocab_size: int, seed: int) -> list[list[int]]:
    """Random token ids from the upper part of the vocabulary, where control tokens are not."""
    rng = random.Random(seed)
    return [[rng.randrange(vocab_size // 8, vocab_size) for _ in range(num_tokens)] for _ in range(num_prompts)]


@dataclass(frozen=True)
class Run:
    """Seconds until the last sequence has its first token, and until the end; all tokens, and those of the first of these times."""

    first_s: float
    elapsed_s: float
    num_tokens: int
    num_early: int


def run(generate: Generate, texts: Sequence[list[int]], *, num_output: int) -> Run:
    began = time.perf_counter()
    first, num_tokens, num_early = began, 0, 0
    waiting = set(range(len(texts)))
    for step in generate(texts, num_output):
        num_tokens += len(step)
        if waiting:
            waiting -= set(step)
            first, num_early = time.perf_counter(), num_tokens
    ended = time.perf_counter()
    if num_tokens != len(texts) * num_output:
        raise SystemExit(f"{num_tokens} tokens were generated, not {len(texts) * num_output}.")
    return Run(first - began, ended - began, num_tokens, num_early)


def rates(generate: Generate, job: dict[str, Any]) -> dict[str, float]:
    """The numbers of a job's batch sizes, and of one long prompt: medians over `repeats` runs, after one run to warm up.

    `decode@N`: tokens/s between the step after which every sequence has a token and the last. `end_to_end@N`: all tokens over the whole
    time. `prefill_512`: tokens of one prompt over the time to its first new token.
    """
    found: dict[str, float] = {}
    num_output = job["output_tokens"]

    def runs(batch: int, num_prompt: int, num_output: int) -> list[Run]:
        done = []
        for repeat in range(job["repeats"] + 1):
            texts = prompts(batch, num_prompt, vocab_size=job["vocab_size"], seed=1000 * batch + repeat)
            done.append(run(generate, texts, num_output=num_output))
        return done[1:]

    for batch in job["batches"]:
        done = runs(batch, job["prompt_tokens"], num_output)
        found[f"decode@{batch}"] = statistics.median(
            [(r.num_tokens - r.num_early) / (r.elapsed_s - r.first_s) for r in done]
        )
        found[f"end_to_end@{batch}"] = statistics.median([r.num_tokens / r.elapsed_s for r in done])
    found["prefill_512"] = PREFILL_TOKENS / statistics.median([r.first_s for r in runs(1, PREFILL_TOKENS, 1)])
    return found
