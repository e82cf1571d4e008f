"""Engines over tiny checkpoints, for tests of the engine itself. One process, no Ray."""

from pathlib import Path
from typing import Any

from workers.checkpoint.model_config import load_model_config
from workers.config import EngineConfig
from workers.engine.llm_engine import LLMEngine
from workers.protocol import GenerateRequest, SamplingParams

# Of the engines of tests, where these say nothing else.
SETTINGS: dict[str, Any] = {
    "max_model_len": 512,
    "block_size": 4,
    "num_kv_blocks": 256,
    "max_num_seqs": 32,
    "max_num_batched_tokens": 64,
    "num_threads": 1,
}


def make_config(folder: Path, **overrides: Any) -> EngineConfig:
    return EngineConfig(model_path=str(folder), model=load_model_config(folder), **(SETTINGS | overrides))


def make_engine(folder: Path, **overrides: Any) -> LLMEngine:
    return LLMEngine(make_config(folder, **overrides))


def make_request(name: str, prompt: list[int], **sampling: Any) -> GenerateRequest:
    """ignore_eos by default, so that lengths are known."""
    params: dict[str, Any] = {"max_tokens": 16, "seed": 0, "ignore_eos": True}
    return GenerateRequest(request_id=name, prompt_token_ids=prompt, sampling=SamplingParams(**(params | sampling)))
