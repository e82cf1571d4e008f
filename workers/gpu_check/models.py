"""Models to check with: the demo model from its files, and Mistral-7B shapes with random weights, which need no files."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

import workers
from workers.checkpoint.model_config import load_model_config
from workers.config import EngineConfig, ModelConfig
from workers.engine.build import build_runner
from workers.engine.execution.model_runner import ModelRunner
from workers.layers.linear import FinishesLoading
from workers.model.mistral import MistralForCausalLM
from workers.parallel.group import SingleRank, TensorParallel
from workers.quant.method import WeightMethod

MISTRAL_7B = ModelConfig(
    vocab_size=32_768,
    hidden_size=4096,
    intermediate_size=14_336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    rms_norm_eps=1e-5,
    rope_theta=1e6,
    sliding_window=None,
    max_position_embeddings=32_768,
    tie_word_embeddings=False,
    bos_token_id=1,
    eos_token_ids=(2,),
    dtype="bfloat16",
    layout="huggingface",
)
# As large as trained ones are, so that activations neither vanish nor overflow.
WEIGHT_SCALE = 0.02


@runtime_checkable
class HasMethod(Protocol):
    """A layer with a matrix."""

    weight: nn.Parameter
    method: WeightMethod


def demo_model() -> Path | None:
    """In a checkout, or where the package is installed."""
    root = Path(workers.__file__).parents[1]
    places = (root / "examples" / "demo_model", root / "cluster" / "demo_model")
    return next((place for place in places if (place / "config.json").exists()), None)


def engine_config(model_path: Path | str, model: ModelConfig | None = None, **settings: Any) -> EngineConfig:
    return EngineConfig(
        model_path=str(model_path), model=model or load_model_config(Path(model_path)), **{"device": "cuda"} | settings
    )


def random_7b(*, num_layers: int = 32, tp: TensorParallel | None = None, **settings: Any) -> ModelRunner:
    """A runner whose KV cache is not allocated yet."""
    model = replace(MISTRAL_7B, num_hidden_layers=num_layers)
    config = engine_config("random weights", model, dtype="bfloat16", **settings)
    return build_runner(config, tp or SingleRank(config.device), load=fill_randomly)


@torch.no_grad()
def fill_randomly(model: MistralForCausalLM) -> None:
    """Norms are ones, as in a new model. Matrices that are quantised while they are loaded are loaded with random numbers."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.fill_(1.0)
        elif not parameter.is_meta:
            parameter.normal_(0.0, WEIGHT_SCALE)
    device = model.lm_head.tp.device
    for module in model.modules():
        if isinstance(module, HasMethod) and module.weight.is_meta:
            values = torch.empty(module.weight.shape, dtype=torch.bfloat16, device=device).normal_(0.0, WEIGHT_SCALE)
            module.method.load(module, values, slice(None))
        if isinstance(module, FinishesLoading):
            module.finish_loading()
