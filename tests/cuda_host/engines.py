"""Engines on the fake device: the real start-up of a rank, with weights that nobody fills, since nobody multiplies them."""

from workers.config import EngineConfig, ModelConfig
from workers.engine.build import build_runner
from workers.engine.core import EngineCore
from workers.engine.model_runner import ModelRunner
from workers.parallel.group import SingleRank, TensorParallel
from workers.protocol import GenerateRequest, SamplingParams

MISTRAL_7B = ModelConfig(
    vocab_size=32768,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    rms_norm_eps=1e-5,
    rope_theta=1e6,
    sliding_window=None,
    max_position_embeddings=32768,
    tie_word_embeddings=False,
    bos_token_id=1,
    eos_token_ids=(2,),
    dtype="bfloat16",
    layout="huggingface",
)


def make_config(**settings) -> EngineConfig:
    return EngineConfig(
        **(
            {"model_path": "", "model": MISTRAL_7B, "device": "cuda", "dtype": "bfloat16", "max_model_len": 32768}
            | settings
        )
    )


def make_runner(config: EngineConfig, tp: TensorParallel | None = None) -> ModelRunner:
    """With its KV cache."""
    runner = build_runner(config, tp or SingleRank("cuda"), load=lambda model: None)
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
