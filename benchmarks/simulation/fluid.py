"""Replicas as a fluid on a clock of seconds: prompt tokens are computed at a speed that falls as sequences decode.

Knows the rates of a model and of a load. Does not know what decides the number of replicas. Counts, no tokens.
"""

from dataclasses import dataclass

import numpy as np

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]  # of requests: arrival in seconds, prompt tokens, output tokens


@dataclass(frozen=True)
class Model:
    """A 7B model on one accelerator: prompt tokens/s while nothing decodes, sequences, KV tokens, seconds per output token."""

    name: str
    tokens_per_s: float
    max_num_seqs: int
    kv_tokens: int
    tpot_s: float
    slowdown: float = 0.4  # of prompts, when every sequence decodes


A10G = Model("A10G", 3_500, 48, 48_000, 0.040)
A100 = Model("A100", 11_000, 128, 400_000, 0.025)


class Load:
    """Prompt tokens and requests in each second."""

    def __init__(self, model: Model, arrays: Arrays, length: int) -> None:
        times, prompts, outputs = arrays
        seconds = times.astype(int)
        self.model, self.length = model, length
        self.tokens = np.bincount(seconds, weights=prompts, minlength=length)
        self.requests = np.bincount(seconds, minlength=length).astype(float)
        self.prompt = prompts.mean()
        self.life_s = max(1.0, outputs.mean() * model.tpot_s)
        self.kv_per_request = self.prompt + outputs.mean()
        self.max_running = min(model.max_num_seqs, model.kv_tokens / self.kv_per_request)
        self.first_running = self.requests[:60].mean() * self.life_s

    def step(self, tokens, replicas, backlog, running):
        """One second. Returns (mean wait, backlog, running, speed); every argument may be an array of alternatives."""
        full = replicas * self.max_running
        speed = self.model.tokens_per_s * (1 - self.model.slowdown * np.minimum(1.0, running / full))
        free = np.maximum(0.0, full - running + running / self.life_s) * self.prompt
        after = backlog + tokens
        after = after - np.minimum(np.minimum(after, replicas * speed), free)
        started = (backlog + tokens - after) / self.prompt
        wait = (backlog + after) / 2 / (replicas * speed)
        return wait, after, running + started - running / self.life_s, speed

    def kept(self, waits: np.ndarray, limit_s: float) -> np.ndarray:
        """The share of requests that met a backlog within the limit; `waits` by second, or by second and alternative."""
        return self.requests @ (waits <= limit_s) / self.requests.sum()

    def p99_s(self, waits: np.ndarray) -> float:
        """The 99th percentile of the backlog that requests met."""
        order = np.argsort(waits)
        count = np.cumsum(self.requests[order])
        return float(waits[order][np.searchsorted(count, 0.99 * count[-1])])
