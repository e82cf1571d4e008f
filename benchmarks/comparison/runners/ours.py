"""Our engine in one process: generation step by step, log-probabilities of given tokens, oneDNN's products, the machine's limits.

Runs in its own interpreter: `python ours.py JOB`, see timing.py. Takes dtype and quantization as EngineConfig has them.
"""

import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
sys.path += [str(ROOT), str(ROOT / "benchmarks")]

import machine  # noqa: E402
import timing  # noqa: E402
import torch  # noqa: E402

from workers.checkpoint.model_config import load_model_config  # noqa: E402
from workers.config import EngineConfig, ModelConfig  # noqa: E402
from workers.engine.llm_engine import LLMEngine  # noqa: E402
from workers.protocol import GenerateRequest, SamplingParams  # noqa: E402


def build(job: dict[str, Any]) -> LLMEngine:
    """Raises SystemExit where this version cannot do what the job asks for."""
    options: dict[str, Any] = {"dtype": job["dtype"]}
    known = {field.name for field in dataclasses.fields(EngineConfig)}
    if job.get("kv_cache_dtype", "auto") != "auto":
        if "kv_cache_dtype" not in known:
            raise SystemExit("This version has no KV cache in fewer bits.")
        options["kv_cache_dtype"] = job["kv_cache_dtype"]
    if job.get("quantization"):
        if "quantization" not in known:
            raise SystemExit("This version has no quantization.")
        options["quantization"] = job["quantization"]
    return LLMEngine(
        EngineConfig(
            model_path=job["model"],
            model=load_model_config(job["model"]),
            max_num_seqs=max(job.get("batches", [1])),
            max_model_len=2048,
            enable_prefix_caching=False,
            **options,
        )
    )


class Steps:
    """The engine as timing.py wants it."""

    def __init__(self, engine: LLMEngine) -> None:
        self.core = engine.core

    def generate(self, prompts: Sequence[list[int]], max_tokens: int) -> Iterator[list[int]]:
        sampling = SamplingParams(max_tokens=max_tokens, seed=0, temperature=0.0, ignore_eos=True)
        for i, prompt in enumerate(prompts):
            self.core.add_request(GenerateRequest(request_id=str(i), prompt_token_ids=prompt, sampling=sampling))
        while self.core.has_work():
            yield [int(delta.request_id) for delta in self.core.step() for _ in delta.token_ids]


def logprobs(engine: LLMEngine, sequences: Sequence[list[int]]) -> list[list[float]]:
    """The log-probability of each token of each sequence after its first, in nats."""
    found = []
    for tokens in sequences:
        sampling = SamplingParams(max_tokens=0, seed=0, prompt_logprobs=0)
        request = GenerateRequest(request_id="0", prompt_token_ids=tokens, sampling=sampling)
        values = [v for delta in engine.stream(request) for v in delta.prompt_logprobs or []]
        found.append([value.logprob for value in values if value is not None])
    return found


def product_shapes(model: ModelConfig) -> list[tuple[int, int]]:
    """(out, in) of a layer's four products."""
    hidden, heads = model.hidden_size, model.num_attention_heads * model.head_dim
    qkv = heads + 2 * model.num_key_value_heads * model.head_dim
    return [(qkv, hidden), (hidden, heads), (2 * model.intermediate_size, hidden), (hidden, model.intermediate_size)]


def packed_products_s(model: ModelConfig, dtype: torch.dtype) -> float:
    """Seconds that oneDNN's packed products of all layers take at 512 rows, the best of five runs."""
    products = []
    for rows, columns in product_shapes(model):
        x = torch.randn(timing.PREFILL_TOKENS, columns).to(dtype)
        weight = torch.ops.mkldnn._reorder_linear_weight(torch.randn(rows, columns).to(dtype), timing.PREFILL_TOKENS)
        products.append((x, weight))
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(model.num_hidden_layers):
            for x, weight in products:
                torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
        best = min(best, time.perf_counter() - began)
    return best


def main() -> None:
    job = timing.read_job()
    result: dict[str, Any] = {}
    if job["measure"] == "machine":
        cpu = torch.device("cpu")
        result["read_bandwidth"] = machine.read_bandwidth(cpu)
        result["float32"] = machine.matmul_rate(cpu, torch.float32)
        result["bfloat16"] = machine.matmul_rate(cpu, torch.bfloat16)
        timing.write_result(result | {"description": machine.describe(cpu)})
        return
    engine = build(job)
    if job["measure"] == "rates":
        result |= timing.rates(Steps(engine).generate, job)
        products_s = packed_products_s(engine.core.config.model, getattr(torch, job["dtype"]))
        result["packed_products_512"] = timing.PREFILL_TOKENS / products_s
    else:
        result["logprobs"] = logprobs(engine, job["sequences"])
    timing.write_result(result)


if __name__ == "__main__":
    main()
