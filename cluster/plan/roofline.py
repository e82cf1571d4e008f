"""The upper bound of a model's speed: the roofline, max(bytes / bandwidth, FLOPs / rate), plus the all-reduces between ranks.

A bound, not a measurement: real kernels reach only part of it, and the engine needs time between steps. Arithmetic only; knows no memory
limits and no price.
"""

from dataclasses import dataclass
from typing import Protocol

from cluster.plan.gpus import Link
from workers.config import DTYPE_BYTES, EngineConfig
from workers.device.model_bytes import has_own_head, head_bytes, num_parameters, vocabulary_weights, weight_bytes


class Processor(Protocol):
    """What computes one rank: a Gpu, or the CPU of a machine."""

    @property
    def bytes_per_s(self) -> float: ...

    @property
    def flops_per_s(self) -> float: ...

    @property
    def link(self) -> Link: ...


@dataclass(frozen=True, kw_only=True)
class Workload:
    """`concurrency` requests at a time, each with a prompt and an answer that together have `context` tokens."""

    context: int
    concurrency: int
    prompt_tokens: int

    @property
    def output_tokens(self) -> int:
        return self.context - self.prompt_tokens

    @property
    def mean_context(self) -> int:
        """The number of tokens before a generated token, averaged over the answer."""
        return self.prompt_tokens + self.output_tokens // 2


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Seconds and rates of one replica.

    step_s: one token for each request. prefill_s: a single prompt on an idle replica, which is its time to first token. tokens_per_s:
    generated tokens of all requests together, including the time for their prompts.
    """

    step_s: float
    prefill_s: float
    tokens_per_s: float


def speed(config: EngineConfig, processor: Processor, workload: Workload) -> Speed:
    batch = workload.concurrency
    step_s = _step_s(config, processor, num_tokens=batch, num_sequences=batch, context=workload.mean_context)
    prefill_s = _prefill_s(config, processor, workload.prompt_tokens)
    # A request costs the time of its prompt, which delays all others, and then its share of each step.
    request_s = prefill_s + workload.output_tokens * step_s / batch
    return Speed(step_s=step_s, prefill_s=prefill_s, tokens_per_s=workload.output_tokens / request_s)


def _prefill_s(config: EngineConfig, processor: Processor, prompt_tokens: int) -> float:
    """In chunks, as the scheduler does; each chunk reads the weights once and attends to the tokens before it."""
    chunk, total_s = config.max_num_batched_tokens, 0.0
    for start in range(0, prompt_tokens, chunk):
        num_tokens = min(chunk, prompt_tokens - start)
        total_s += _step_s(config, processor, num_tokens=num_tokens, num_sequences=1, context=start + num_tokens // 2)
    return total_s


def _step_s(config: EngineConfig, processor: Processor, *, num_tokens: int, num_sequences: int, context: int) -> float:
    """One forward pass on each rank. context: the average number of keys before a query; the window limits how many it sees."""
    model, size, itemsize = config.model, config.tensor_parallel_size, DTYPE_BYTES[config.dtype]
    # Of all layers: the keys that a query sees.
    seen = sum(context if window is None else min(context, window) for window in model.layer_windows)
    # Only the step's rows of the embedding table are read. A tied table is also the head, which is read entirely, unless that has a form
    # of its own.
    head = vocabulary_weights(config)
    untied = 0 if model.tie_word_embeddings else head
    table = head if has_own_head(config) else untied
    matrices = weight_bytes(config) - table * itemsize
    if model.tie_word_embeddings and not has_own_head(config):
        matrices += head_bytes(config) - head * itemsize  # the copy that computes
    kv = num_sequences * seen * config.kv_layer_bytes
    # Two FLOPs per weight and token, and two per query-key and per probability-value product.
    heads = model.num_attention_heads // size
    attention = 4 * heads * model.head_dim * seen
    # Logits are computed for one row per sequence.
    flops = num_tokens * (2 * (num_parameters(config) - untied - head) + attention) + num_sequences * 2 * head
    compute_s = max((matrices + kv) / processor.bytes_per_s, flops / processor.flops_per_s)
    return compute_s + _all_reduces_s(config, processor, num_tokens)


def _all_reduces_s(config: EngineConfig, processor: Processor, num_tokens: int) -> float:
    """Two per layer, and one for the embedding. In a ring each rank sends 2 (n - 1) / n of the tensor."""
    size = config.tensor_parallel_size
    if size == 1:
        return 0.0
    tensor_bytes = num_tokens * config.model.hidden_size * DTYPE_BYTES[config.dtype]
    one_s = processor.link.latency_s + 2 * (size - 1) / size * tensor_bytes / processor.link.bytes_per_s
    return (2 * config.model.num_hidden_layers + 1) * one_s
