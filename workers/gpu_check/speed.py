"""How fast a 7B model with random weights decodes and prefills, each beside the limit that the GPU's own ceilings set."""

import itertools
from collections.abc import Sequence
from functools import partial

from workers.config import Quantization
from workers.device.model_bytes import num_layer_weights, vocabulary_weights
from workers.engine.batch import ForwardBatch
from workers.gpu_check.ceilings import Ceilings, seconds
from workers.gpu_check.model_cases import decode_batch, prefill_batch
from workers.gpu_check.models import MISTRAL_7B, HasMethod, random_7b
from workers.gpu_check.report import Report

DECODE_SEQS, DECODE_CONTEXTS = (1, 8, 64, 256), (1024, 8192, 32_000)
PREFILL_TOKENS = (1024, 4096, 16_384)
CHUNK = 4096
TARGETS = {("decode", 1, 1024): 0.85, ("decode", 64, 1024): 0.70, ("prefill", 4096, 0): 0.65}


def check(report: Report, ceilings: Ceilings) -> None:
    """Allocates the KV cache as a replica does, and captures all graphs."""
    runner = random_7b(max_num_seqs=256, max_model_len=32_768, max_num_batched_tokens=CHUNK)
    num_blocks = runner.allocate_kv_cache()
    report.add("KV cache of a replica", "measured", blocks=num_blocks, tokens=num_blocks * runner.config.block_size)
    while (size := runner.size_to_capture(is_idle=True)) is not None and report.has_time:
        runner.capture(size)
    head = runner.model.lm_head.weight.nbytes
    layers = sum(p.nbytes for p in runner.model.model.layers.parameters())
    for num_seqs, context in itertools.product(DECODE_SEQS, DECODE_CONTEXTS):
        name = f"decode, {num_seqs} x {context:,} tokens"
        if num_seqs * (context // runner.config.block_size + 1) > num_blocks:
            report.add(name, "left out", "the KV cache is too small")
        elif not report.has_time:
            report.add(name, "left out", "the time is up")
        else:
            batch = decode_batch(num_seqs, context, runner.config)
            took_s = seconds(partial(runner.execute, batch))
            num_bytes = layers + head + num_seqs * context * runner.config.kv_block_bytes / runner.config.block_size
            # Two operations for each weight of two bytes.
            limit_s = max(num_bytes / ceilings.bytes_per_s, num_seqs * (layers + head) / ceilings.flops_per_s)
            _add(report, name, limit_s, took_s, num_seqs, TARGETS.get(("decode", num_seqs, context)))
    for num_tokens in PREFILL_TOKENS:
        name = f"prefill, {num_tokens:,} tokens"
        if not report.has_time:
            report.add(name, "left out", "the time is up")
            continue
        chunks = [
            prefill_batch([7] * min(CHUNK, num_tokens - start), runner.config.block_size, start=start)
            for start in range(0, num_tokens, CHUNK)
        ]

        def prefill(chunks: Sequence[ForwardBatch] = chunks) -> None:
            for chunk in chunks:
                runner.execute(chunk)

        took_s = seconds(prefill, repeats=3)
        attention = (
            2.0 * num_tokens**2 * MISTRAL_7B.num_attention_heads * MISTRAL_7B.head_dim * MISTRAL_7B.num_hidden_layers
        )
        limit_s = (num_tokens * layers + attention) / ceilings.flops_per_s
        _add(report, name, limit_s, took_s, num_tokens, TARGETS.get(("prefill", num_tokens, 0)))


def check_quantized(report: Report, ceilings: Ceilings, quantization: Quantization) -> None:
    """The steps that have targets in bf16, with the limits of what they read now."""
    runner = random_7b(quantization=quantization, max_num_seqs=64, max_model_len=8192, max_num_batched_tokens=CHUNK)
    runner.allocate_kv_cache()
    while (size := runner.size_to_capture(is_idle=True)) is not None and report.has_time:
        runner.capture(size)
    config = runner.config
    num_weights = num_layer_weights(config) + vocabulary_weights(config)
    matrices = [module for module in runner.model.modules() if isinstance(module, HasMethod)]
    weights = sum(parameter.nbytes for module in matrices for parameter in module.parameters(recurse=False))
    for num_seqs, context in ((1, 1024), (64, 1024)):
        took_s = seconds(partial(runner.execute, decode_batch(num_seqs, context, config)))
        num_bytes = weights + num_seqs * context * config.kv_token_bytes
        limit_s = max(num_bytes / ceilings.bytes_per_s, num_seqs * 2 * num_weights / ceilings.flops_per_s)
        _add(report, f"decode, {num_seqs} x {context:,} tokens", limit_s, took_s, num_seqs, None)
    took_s = seconds(partial(runner.execute, prefill_batch([7] * CHUNK, config.block_size)), repeats=3)
    limit_s = CHUNK * 2 * num_layer_weights(config) / ceilings.flops_per_s
    _add(report, f"prefill, {CHUNK:,} tokens", limit_s, took_s, CHUNK, None)


def _add(report: Report, name: str, limit_s: float, took_s: float, num_tokens: int, target: float | None) -> None:
    figures = {"ms": took_s * 1e3, "tokens_per_s": num_tokens / took_s}
    if target is None:
        report.add(name, "measured", f"{limit_s / took_s:.0%} of the limit", share=limit_s / took_s, **figures)
    else:
        report.target(name, limit_s / took_s, target, **figures)
