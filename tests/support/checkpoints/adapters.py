"""Random LoRA adapters as PEFT folders. `write_adapter` writes the files itself, `write_with_peft` lets PEFT do it."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from workers.lora.peft_config import ATTENTION_MODULES, MODULES
from workers.lora.peft_folder import module_shapes
from workers.model_numbers import ModelConfig

# Large enough that an adapter left out, or another one's, shows in the first token.
STRENGTH = 0.3


def write_adapter(
    folder: Path,
    model: ModelConfig,
    *,
    seed: int = 0,
    rank: int = 4,
    modules: tuple[str, ...] = MODULES,
    dtype: torch.dtype = torch.float32,
    strength: float = STRENGTH,
    **fields: Any,
) -> Path:
    """All layers of the model, with the names that PEFT gives. fields: of adapter_config.json."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(model.num_hidden_layers):
        for module in modules:
            outputs, inputs = module_shapes(model)[module]
            part = "self_attn" if module in ATTENTION_MODULES else "mlp"
            for half, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
                name = f"base_model.model.model.layers.{layer}.{part}.{module}.lora_{half}.weight"
                tensors[name] = (torch.randn(shape, generator=generator) * strength).to(dtype)
    return write_folder(folder, tensors, rank=rank, modules=modules, **fields)


def write_folder(
    folder: Path,
    tensors: dict[str, torch.Tensor],
    *,
    rank: int = 4,
    modules: tuple[str, ...] = MODULES,
    **fields: Any,
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": list(modules), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config | fields))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def write_with_peft(folder: Path, model: PreTrainedModel, *, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """PEFT's own folder, with random B. Returns the model with the adapter merged into its weights, as PEFT merges it."""
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted = get_peft_model(model, LoraConfig(**settings))
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=STRENGTH)
    adapted.save_pretrained(str(folder))
    merged: PreTrainedModel = adapted.merge_and_unload()
    return merged.eval()
