"""Times generations step by step, the same way for every engine. Runs in each engine's own interpreter, so it needs nothing installed.

An engine is a function from prompts to an iterator that yields once after each step: the number of the sequence of each new token.
"""

import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

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


def rates(generate: Generate, job: dict[str, Any]) -> dict[str, float]:
    """Medians over `repeats` runs of each batch size, after one run to warm up.

    `decode@N`: tokens/s between the first step in which every sequence has a token and the last. `end_to_end@N`: all tokens over the
    whole time. `prefill@N`: prompt tokens over the time to the first token of the last sequence.
    """
    found: dict[str, float] = {}
    num_prompt, num_output = job["prompt_tokens"], job["output_tokens"]
    for batch in job["batches"]:
        samples: dict[str, list[float]] = {"decode": [], "end_to_end": [], "prefill": []}
        for repeat in range(job["repeats"] + 1):
            texts = prompts(batch, num_prompt, vocab_size=job["vocab_size"], seed=1000 * batch + repeat)
            began = time.perf_counter()
            first, num_tokens, num_early = began, 0, 0
            waiting = set(range(batch))
            for step in generate(texts, num_output):
                num_tokens += len(step)
                if waiting:
                    waiting -= set(step)
                    first, num_early = time.perf_counter(), num_tokens
            ended = time.perf_counter()
            if num_tokens != batch * num_output:
                raise SystemExit(f"{num_tokens} tokens were generated, not {batch * num_output}.")
            if repeat == 0:
                continue
            samples["prefill"].append(batch * num_prompt / (first - began))
            samples["end_to_end"].append(num_tokens / (ended - began))
            if num_tokens > num_early:
                samples["decode"].append((num_tokens - num_early) / (ended - first))
        found |= {f"{name}@{batch}": statistics.median(values) for name, values in samples.items() if values}
    return found
