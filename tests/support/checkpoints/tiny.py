"""Writes tiny random Mistral checkpoints in both published layouts, for every test that needs a model.

The Hugging Face layout comes from transformers itself, so comparing with transformers proves something. Weights are wide enough
(and norm weights uneven enough) that a wrong window, rotary angle, slice or norm shows in the logits. Knows nothing of `workers`.
"""

import json
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from transformers import MinistralConfig, MinistralForCausalLM, MistralConfig, MistralForCausalLM

TINY: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,  # tensor-parallel sizes 1, 2 and 4
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.12,
}


def write_tiny_checkpoint(
    folder: str | Path,
    *,
    seed: int = 0,
    sliding_window: int | None = 16,
    layout: Literal["huggingface", "mistral"] = "huggingface",
    num_shards: int = 1,
    rope_theta: float = 10_000.0,
    dtype: torch.dtype = torch.float32,
    **overrides: Any,
) -> Path:
    """Writes a random checkpoint into `folder` (made if missing) and returns the folder.

    The same seed and overrides give the same model in either layout and any number of shards. `overrides` are MistralConfig
    fields over TINY, for example num_key_value_heads=8 for tensor-parallel size 8. layer_types gives each layer its attention.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model = make_tiny_model(seed=seed, sliding_window=sliding_window, rope_theta=rope_theta, dtype=dtype, **overrides)
    if layout == "huggingface":
        num_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        # One tensor more than an even share would hold may open a further shard, so the count is at least num_shards.
        max_shard_size = num_bytes + 1 if num_shards == 1 else num_bytes // num_shards
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        (folder / "generation_config.json").unlink(missing_ok=True)
    else:
        _write_mistral_layout(model, folder, num_shards=num_shards)
    return folder


def make_tiny_model(
    *,
    seed: int = 0,
    sliding_window: int | None = 16,
    rope_theta: float = 10_000.0,
    dtype: torch.dtype = torch.float32,
    **overrides: Any,
) -> MistralForCausalLM:
    """The transformers model that `write_tiny_checkpoint` writes, in eval mode. Leaves torch's global seed as it was."""
    # Only Ministral's class computes each layer's own window.
    kinds = (
        (MinistralConfig, MinistralForCausalLM) if "layer_types" in overrides else (MistralConfig, MistralForCausalLM)
    )
    config = kinds[0](
        **{**TINY, **overrides},
        sliding_window=sliding_window,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kinds[1](config)
        for name, parameter in model.named_parameters():
            if "norm" in name:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model.to(dtype).eval()


def _write_mistral_layout(model: MistralForCausalLM, folder: Path, *, num_shards: int) -> None:
    c = model.config
    params = {
        "dim": c.hidden_size,
        "n_layers": c.num_hidden_layers,
        "head_dim": c.head_dim,
        "hidden_dim": c.intermediate_size,
        "n_heads": c.num_attention_heads,
        "n_kv_heads": c.num_key_value_heads,
        "norm_eps": c.rms_norm_eps,
        "vocab_size": c.vocab_size,
        "rope_theta": c.rope_parameters["rope_theta"],
        "max_seq_len": c.max_position_embeddings,
    }
    if getattr(c, "layer_types", None) is not None:
        params["sliding_window"] = [c.sliding_window if kind == "sliding_attention" else None for kind in c.layer_types]
    elif c.sliding_window is not None:
        params["sliding_window"] = c.sliding_window
    if c.tie_word_embeddings:
        params["tied_embeddings"] = True
    (folder / "params.json").write_text(json.dumps(params, indent=2))

    tensors = {}
    for name, parameter in model.named_parameters():
        tensor = parameter.detach()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            tensor = _interleave_rotary_rows(tensor, c.head_dim)
        tensors[_mistral_name(name)] = tensor.contiguous()
    if num_shards == 1:
        save_file(tensors, folder / "consolidated.safetensors")
        return
    names = sorted(tensors)
    weight_map = {}
    for i in range(num_shards):
        file = f"consolidated-{i + 1:05d}-of-{num_shards:05d}.safetensors"
        save_file({name: tensors[name] for name in names[i::num_shards]}, folder / file)
        weight_map.update(dict.fromkeys(names[i::num_shards], file))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "consolidated.safetensors.index.json").write_text(json.dumps(index))


def _interleave_rotary_rows(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Hugging Face row order to Mistral's. Per head of 4 rows: [a0, a1, b0, b1] becomes [a0, b0, a1, b1]."""
    num_rows, num_columns = weight.shape
    return weight.view(-1, 2, head_dim // 2, num_columns).transpose(1, 2).reshape(num_rows, num_columns)


def _mistral_name(name: str) -> str:
    for old, new in (
        ("model.embed_tokens", "tok_embeddings"),
        ("model.norm", "norm"),
        ("lm_head", "output"),
        ("model.layers", "layers"),
        ("self_attn.q_proj", "attention.wq"),
        ("self_attn.k_proj", "attention.wk"),
        ("self_attn.v_proj", "attention.wv"),
        ("self_attn.o_proj", "attention.wo"),
        ("mlp.gate_proj", "feed_forward.w1"),
        ("mlp.down_proj", "feed_forward.w2"),
        ("mlp.up_proj", "feed_forward.w3"),
        ("input_layernorm", "attention_norm"),
        ("post_attention_layernorm", "ffn_norm"),
    ):
        name = name.replace(old, new)
    return name
