"""Engines on the fake device: the real start-up of a rank, with weights that nobody fills, since nobody multiplies them."""

from workers.config import EngineConfig
from workers.engine.build import build_runner
from workers.engine.core import EngineCore
from workers.engine.execution.model_runner import ModelRunner
from workers.gpu_check.models import MISTRAL_7B, fill_randomly
from workers.parallel.group import SingleRank, TensorParallel
from workers.protocol import GenerateRequest, SamplingParams


def make_config(**settings) -> EngineConfig:
    return EngineConfig(
        **(
            {"model_path": "", "model": MISTRAL_7B, "device": "cuda", "dtype": "bfloat16", "max_model_len": 32768}
            | settings
        )
    )


def make_runner(config: EngineConfig, tp: TensorParallel | None = None) -> ModelRunner:
    """With its KV cache."""
    # Quantised weights have no memory before they are loaded.
    load = (lambda model: None) if config.quantization is None else fill_randomly
    runner = build_runner(config, tp or SingleRank("cuda"), load=load)
    runner.allocate_kv_cache()
    return runner


def make_core(config: EngineConfig, tp: TensorParallel | None = None) -> EngineCore:
    runner = make_runner(config, tp)
    return EngineCore(config, runner, runner.tp)


def make_request(name: str, num_prompt_tokens: int, *, max_tokens: int, **sampling) -> GenerateRequest:
    """Never stops early: the fake device samples token 0, always."""
    parameters = {"temperature": 0.0, "seed": 1, "ignore_eos": True} | sampling
    return GenerateRequest(
        request_id=name,
        prompt_token_ids=[5 + i % 1000 for i in range(num_prompt_tokens)],
        sampling=SamplingParams(max_tokens=max_tokens, **parameters),
    )
