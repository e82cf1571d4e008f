"""Whole models on the GPU: four layers of a 7B against transformers, the demo model's streams, CUDA graphs, two ranks on one device."""

import random
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from workers.config import EngineConfig, Quantization
from workers.engine.batch import ForwardBatch, dummy_batch
from workers.engine.build import build_runner
from workers.engine.core import EngineCore
from workers.engine.follower import run_follower
from workers.engine.llm_engine import LLMEngine, run_requests
from workers.gpu_check.models import engine_config, random_7b
from workers.gpu_check.report import Report
from workers.gpu_check.thread_group import Shared, ThreadGroup
from workers.parallel.group import SingleRank
from workers.protocol import GenerateRequest, SamplingParams

NUM_STREAMS, NUM_TP_STREAMS, NUM_TOKENS, MAX_PROMPT = 64, 16, 32, 40
# Logits of four layers with random weights in float32, relative to the largest.
TRANSFORMERS_TOLERANCE = 2e-3
# A GPU and a CPU may choose another token where the two best differ by less than this.
NEAR_TIE = 0.02


def against_transformers(report: Report, device: torch.device, *, num_layers: int = 4) -> None:
    name = f"{num_layers} layers of a 7B against transformers"
    try:
        from transformers import MistralConfig, MistralForCausalLM
    except ImportError:
        report.add(name, "left out", "transformers is not installed")
        return
    config = MistralConfig(
        num_hidden_layers=num_layers,
        vocab_size=32_768,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        sliding_window=None,
        max_position_embeddings=4096,
    )
    token_ids = random.Random(0).choices(range(3, 32_768), k=200)
    with tempfile.TemporaryDirectory() as folder:
        MistralForCausalLM(config).bfloat16().save_pretrained(folder)
        # Read again: the angles of the model above are in bfloat16, too.
        reference = MistralForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        nn.Module.to(reference, device)
        with torch.inference_mode():
            expected = reference(torch.tensor([token_ids], device=device)).logits[0, -1].float()
        del reference
        torch.cuda.empty_cache()
        settings: dict[str, Any] = {
            "dtype": "float32",
            "num_kv_blocks": 64,
            "max_model_len": 512,
            "max_num_batched_tokens": 256,
        }
        runner = build_runner(engine_config(folder, device=device.type, **settings), SingleRank(device))
        runner.allocate_kv_cache()
        logits = runner.execute(prefill_batch(token_ids, runner.config.block_size))
    assert logits is not None
    error = ((logits[0] - expected).abs().max() / expected.abs().max()).item()
    report.check(name, error < TRANSFORMERS_TOLERANCE, worst_error=error)


def streams(report: Report, path: Path, device: torch.device, *, num_streams: int = NUM_STREAMS) -> None:
    """Greedy streams of the demo model on the device: deterministic, in float32, next to the CPU's; each cut at every token and resumed."""
    settings: dict[str, Any] = {
        "dtype": "float32",
        "max_model_len": 512,
        "num_kv_blocks": 4096,
        "max_num_batched_tokens": 1024,
    }
    on_gpu = LLMEngine(engine_config(path, device=device.type, max_num_seqs=256, deterministic=True, **settings))
    on_cpu = LLMEngine(engine_config(path, device="cpu", max_num_seqs=64, **settings))
    prompts = _prompts(on_gpu.core.config, num_streams)
    whole = [_request(f"{i}", prompt, logprobs=2) for i, prompt in enumerate(prompts)]
    got, expected = on_gpu.generate(whole), _with_gaps(on_cpu, whole)
    equal = sum(tokens == right for tokens, (right, _) in zip(got, expected, strict=True))
    unexplained = [
        i for i, (tokens, right) in enumerate(zip(got, expected, strict=True)) if not _is_near(tokens, *right)
    ]
    report.check(
        f"{num_streams} greedy streams of the demo model on GPU and CPU",
        not unexplained,
        f"{equal} equal, {num_streams - equal - len(unexplained)} part at a near tie, {len(unexplained)} differ",
    )
    _check_resumed(report, "deterministic: each stream cut at every token and resumed", on_gpu, prompts, got)


def quantized_streams(
    report: Report, path: Path, device: torch.device, quantization: Quantization, *, num_streams: int = NUM_STREAMS
) -> None:
    """Greedy streams of the demo model with quantised weights, in bfloat16, each cut at every token and resumed."""
    settings: dict[str, Any] = {"dtype": "bfloat16", "max_model_len": 512, "num_kv_blocks": 4096, "max_num_seqs": 256}
    config = engine_config(path, device=device.type, quantization=quantization, deterministic=True, **settings)
    engine = LLMEngine(config)
    prompts = _prompts(config, num_streams)
    got = engine.generate([_request(f"{i}", prompt) for i, prompt in enumerate(prompts)])
    _check_resumed(report, f"{quantization}, deterministic: streams cut and resumed", engine, prompts, got)


def _check_resumed(
    report: Report, name: str, engine: LLMEngine, prompts: Sequence[list[int]], got: Sequence[list[int]]
) -> None:
    resumed = [
        _request(f"{i}-{cut}", prompt, output=tokens[:cut])
        for i, (prompt, tokens) in enumerate(zip(prompts, got, strict=True))
        for cut in range(1, len(tokens))
    ]
    ends = [tokens[cut:] for tokens in got for cut in range(1, len(tokens))]
    random.Random(4).shuffle(order := list(range(len(resumed))))
    rest = engine.generate([resumed[i] for i in order])
    num_wrong = sum(tokens != ends[i] for i, tokens in zip(order, rest, strict=True))
    report.check(name, not num_wrong, f"{len(ends) - num_wrong:,} of {len(ends):,} equal")


def graphs(report: Report) -> None:
    """A replayed decode step gives the bits of the eager one."""
    sizes = (1, 2, 5, 8, 16)
    runner = random_7b(num_layers=2, max_num_seqs=16, num_kv_blocks=512, max_model_len=512, max_num_batched_tokens=512)
    runner.allocate_kv_cache()
    batches = [decode_batch(n, 100, runner.config, seed=n) for n in sizes]
    eager = [_logits(runner.execute(batch)) for batch in batches]
    while (size := runner.size_to_capture(is_idle=True)) is not None:
        runner.capture(size)
    replayed = [_logits(runner.execute(batch)) for batch in batches]
    wrong = [n for n, a, b in zip(sizes, eager, replayed, strict=True) if not torch.equal(a, b)]
    report.check("CUDA graphs: replay equals eager, bit for bit", not wrong, f"wrong at sizes {wrong}" if wrong else "")


def two_ranks(report: Report, path: Path, device: torch.device) -> None:
    """The demo model as two tensor-parallel ranks, two threads on one GPU."""
    settings: dict[str, Any] = {
        "dtype": "float32",
        "max_model_len": 512,
        "num_kv_blocks": 512,
        "cuda_graphs": False,
        "overlap": False,
    }
    single = LLMEngine(engine_config(path, device=device.type, **settings))
    requests = [_request(f"{i}", prompt) for i, prompt in enumerate(_prompts(single.core.config, NUM_TP_STREAMS))]
    expected = single.generate(requests)
    config = engine_config(path, device=device.type, tensor_parallel_size=2, **settings)
    shared = Shared(2)

    def follow() -> None:
        group = ThreadGroup(shared, 1, device)
        runner = build_runner(config, group)
        runner.allocate_kv_cache()
        run_follower(runner, group)

    follower = threading.Thread(target=follow, daemon=True)
    follower.start()
    group = ThreadGroup(shared, 0, device)
    runner = build_runner(config, group)
    runner.allocate_kv_cache()
    core = EngineCore(config, runner, group)
    got = run_requests(core, requests)
    core.shutdown()
    follower.join(10)
    num_equal = sum(a == b for a, b in zip(got, expected, strict=True))
    # Sums over ranks are rounded in another order, so a stream may part at a near tie.
    report.check(
        "two tensor-parallel ranks on one GPU", num_equal >= len(expected) - 2, f"{num_equal} of {len(expected)} equal"
    )


def prefill_batch(token_ids: Sequence[int], block_size: int, *, start: int = 0) -> ForwardBatch:
    """The tokens of one prompt from position `start` on, in adjacent blocks."""
    n = len(token_ids)
    positions = np.arange(start, start + n, dtype=np.int32)
    return replace(
        dummy_batch(n, n, block_size),
        token_ids=np.array(token_ids, dtype=np.int32),
        positions=positions,
        slot_mapping=(positions + block_size)[None],
        seq_lens=np.array([start + n], dtype=np.int32),
        block_table=np.arange(1, 1 + -(-(start + n) // block_size), dtype=np.int32)[None, None],
    )


def decode_batch(num_seqs: int, context: int, config: EngineConfig, *, seed: int = 0) -> ForwardBatch:
    """One new token of each sequence after `context` tokens, in permuted blocks that hold zeros or what was written before."""
    rng = np.random.default_rng(seed)
    size = config.block_size
    per_seq = -(-(context + 1) // size)
    blocks = (rng.permutation(num_seqs * per_seq) + 1).astype(np.int32).reshape(num_seqs, per_seq)
    ones = np.ones(num_seqs, dtype=np.int32)
    return replace(
        dummy_batch(num_seqs, 1, size),
        token_ids=rng.integers(3, config.model.vocab_size, num_seqs).astype(np.int32),
        positions=ones * context,
        slot_mapping=(blocks[:, context // size] * size + context % size).astype(np.int32)[None],
        seq_lens=ones * (context + 1),
        block_table=blocks[None],
    )


def _logits(logits: torch.Tensor | None) -> torch.Tensor:
    assert logits is not None, "the only rank has the logits"
    return logits.clone()


def _prompts(config: EngineConfig, num: int) -> list[list[int]]:
    rng = random.Random(2)
    vocab_size = config.model.vocab_size
    return [[rng.randrange(3, vocab_size) for _ in range(rng.randrange(1, MAX_PROMPT))] for _ in range(num)]


def _request(
    name: str, prompt: list[int], *, output: Sequence[int] = (), logprobs: int | None = None
) -> GenerateRequest:
    sampling = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, seed=0, ignore_eos=True, logprobs=logprobs)
    return GenerateRequest(request_id=name, prompt_token_ids=prompt, output_token_ids=list(output), sampling=sampling)


def _with_gaps(engine: LLMEngine, requests: Sequence[GenerateRequest]) -> list[tuple[list[int], list[float]]]:
    """Tokens, and by how much each was better than the second best."""
    tokens: dict[str, tuple[list[int], list[float]]] = {r.request_id: ([], []) for r in requests}
    for delta in engine.stream(*requests):
        ids, gaps = tokens[delta.request_id]
        ids += delta.token_ids
        gaps += [one.top[0][1] - one.top[1][1] for one in delta.logprobs or ()]
    return list(tokens.values())


def _is_near(tokens: list[int], expected: list[int], gaps: list[float]) -> bool:
    """Whether both are equal up to a near tie."""
    different = next((i for i, (a, b) in enumerate(zip(tokens, expected, strict=True)) if a != b), None)
    return different is None or gaps[different] < NEAR_TIE
